"""The plan: names, numbers and reasons, without touching a weight."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass import ConfigError, Override, RotationConfig
from spinpass.planning import RotationPlan
from tests.support.decoders import (
    BATCH,
    FFN,
    HEADS,
    HIDDEN,
    KV,
    SEQ,
    VOCAB,
    Block,
    Decoder,
    RMSNorm,
    exported,
    made,
    outcome,
)
from tests.support.kronecker import by_factors


@cache
def program(**settings: Any) -> ExportedProgram:
    return exported(made(Decoder(**settings)))


def planned(source: ExportedProgram | None = None, **settings: Any) -> RotationPlan:
    return spinpass.plan(source or program(), RotationConfig(**settings))


def test_names_follow_the_modules() -> None:
    assert [s.name for s in planned(program(layers=2)).spaces] == [
        "R1:residual",
        "R2:blocks.0.attn",
        "R2:blocks.1.attn",
        "R3:blocks.0.attn",
        "R3:blocks.1.attn",
        "R4:blocks.0.mlp.down",
        "R4:blocks.1.mlp.down",
    ]
    online = [s.name for s in planned(rotations="R1", form="online").spaces]
    assert online == ["R1:blocks.0.attn", "R1:blocks.0.mlp", "R1:head"]


def test_spaces_list_their_constants() -> None:
    spaces = {s.name: s for s in planned(program(bias=True)).spaces}
    assert spaces["R1:residual"].writers == (
        "blocks.0.attn.o.bias",
        "blocks.0.attn.o.weight",
        "blocks.0.mlp.down.bias",
        "blocks.0.mlp.down.weight",
        "embed.weight",
    )
    assert set(spaces["R1:residual"].readers) == {
        f"blocks.0.{x}.weight" for x in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    } | {"head.weight"}
    assert spaces["R2:blocks.0.attn"].writers == ("blocks.0.attn.v.bias", "blocks.0.attn.v.weight")
    assert spaces["R2:blocks.0.attn"].readers == ("blocks.0.attn.o.weight",)
    assert spaces["R4:blocks.0.mlp.down"].readers == ("blocks.0.mlp.down.weight",)
    assert [s.size for s in spaces.values()] == [HIDDEN, 8, 8, FFN]


def test_online_parts_cost_what_their_rotation_costs() -> None:
    plan = planned()
    by = {s.role: s for s in plan.spaces}
    assert by["R1"].flops == by["R2"].flops == 0
    assert by["R3"].flops == (HEADS + KV) * by["R3"].rotation.flops  # every head of a token
    assert by["R4"].flops == by["R4"].rotation.flops
    assert plan.flops == sum(s.flops for s in plan.spaces)
    assert BATCH * SEQ > 1  # per token, not per call


def test_a_table_prints_with_one_line_per_space() -> None:
    text = str(planned(program(norm="rms", post_norm=True)))
    lines = text.splitlines()
    plan = planned(program(norm="rms", post_norm=True))
    assert lines[0].split() == [
        "space",
        "size",
        "rotation",
        "form",
        "admits",
        "writers",
        "readers",
        "online",
        "FLOP/token",
        "bytes",
    ]
    assert len(lines) == 2 + len(plan.spaces) + len(plan.admissions) + len(plan.refusals) + 1
    assert (
        lines[-1]
        == f"total: {len(plan.spaces)} spaces, {plan.flops:,} FLOP per token added, {plan.bytes_added:,} bytes added"
    )
    assert any(line.startswith("refused  R1 offline: the residual stream needs") for line in lines)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(form="online", kind="random-matrix"), dict(rotations="R1", tied="keep", kind="random-hadamard")],
)
def test_json(settings: dict[str, Any]) -> None:
    plan = planned(program(tied=True), **settings)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data == plan.to_dict()
    assert [s["name"] for s in data["spaces"]] == [s.name for s in plan.spaces]
    assert data["bytes_added"] == sum(s["bytes_added"] for s in data["spaces"])
    assert all(len(s["fingerprint"]) == 64 for s in data["spaces"])
    assert data["flops_per_token"] == sum(p["flops_per_token"] for s in data["spaces"] for p in s["online"])


def test_planning_is_deterministic() -> None:
    a, b = planned(kind="random-hadamard"), planned(exported(made(Decoder())), kind="random-hadamard")
    assert a.to_dict() == b.to_dict()


def test_a_space_has_the_same_rotation_whatever_else_is_rotated() -> None:
    alone = {
        s.name: s.rotation.fingerprint()
        for role in ("R1", "R2", "R3", "R4")
        for s in planned(rotations=role, kind="random-hadamard").spaces
    }
    assert alone == {s.name: s.rotation.fingerprint() for s in planned(kind="random-hadamard").spaces}


def test_layers_differ_and_so_do_seeds() -> None:
    two = program(layers=2)
    prints = [s.rotation.fingerprint() for s in planned(two, kind="random-hadamard").spaces]
    assert len(set(prints)) == len(prints)
    assert not set(prints) & {s.rotation.fingerprint() for s in planned(two, kind="random-hadamard", seed=1).spaces}


def test_overrides_reach_their_spaces() -> None:
    plan = planned(
        program(layers=2),
        overrides={"R4": Override(block_size=8), "R4:blocks.1.*": Override(kind="random-hadamard", block_size=4)},
    )
    orders = {s.name: (s.rotation.kind, s.rotation.order) for s in plan.spaces}
    assert orders["R4:blocks.0.mlp.down"] == ("hadamard", 8)
    assert orders["R4:blocks.1.mlp.down"] == ("random-hadamard", 4)
    assert orders["R1:residual"] == ("hadamard", 24)


def test_a_summary_tells_factors_from_hadamards() -> None:
    """What is not structured is a change of basis; the number is that of its places, one or several."""
    config = RotationConfig(rotations="R1,R4", form="online")
    plain, factors = (planned(rotations="R1,R4", form="online", matrices=m) for m in ({}, by_factors(program(), config)))
    assert "1 Hadamard:" in str(plain) and "basis" not in str(plain)
    assert "1 change of basis:" in str(factors) and "Hadamard:" not in str(factors)


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("R2:*", {"R2"}),
        ("blocks.0.attn.v.weight", {"R1", "R2"}),
        ("blocks.0.mlp.down", {"R4"}),
        ("R?:*", {"R1", "R2", "R3", "R4"}),
    ],
)
def test_exclusions_say_so(pattern: str, gone: set[str]) -> None:
    plan = planned(exclude=pattern, form="offline")
    assert {s.role for s in plan.spaces} == {"R1", "R2", "R3", "R4"} - gone
    assert {r.what.split(":")[0] for r in plan.refusals if r.why == f"excluded by {pattern!r}"} == gone


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(exclude="R4:*.up"), r"exclude has 'R4:\*.up', which is no space and no parameter .* the nearest is 'R4:.*down'"),
        (dict(exclude=("R2:*", "model.blocks.0.*")), "exclude has 'model.blocks.0.*'.*; the nearest is '.*blocks.0"),
        (dict(overrides={"R2:block.0.attn": Override(seed=1)}), "overrides has 'R2:block.0.attn', which is no space .*'R2:blocks.0.attn'"),
        (dict(overrides={"R3": Override(seed=1)}, rotations="R1,R2"), "overrides has 'R3', and R3 is not among the rotations"),
        (dict(matrices={"R1:nosuch": torch.eye(3)}), "matrices has 'R1:nosuch', which is no space"),
    ],
)
def test_what_speaks_of_nothing_is_said(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        planned(**settings)


def test_leaving_spaces_out() -> None:
    plan = planned()
    less = plan.without("R1:residual", "R4:blocks.0.mlp.down")
    assert [s.role for s in less.spaces] == ["R2", "R3"]
    assert "R1:residual: left out of the plan" in str(less)
    assert len(plan.spaces) == 4
    with pytest.raises(ConfigError, match="the plan has no space 'R9:x'; it has R1:residual, "):
        plan.without("R9:x")


class TwoStreams(Decoder):
    """Two streams, and layers whose parameters share a prefix: names that would be the same."""

    def prepare(self) -> None:
        self.other, self.block = nn.Embedding(VOCAB, HIDDEN), Block(self.s)

    def finish(self, x: Tensor) -> Tensor:
        y = self.block(self.other(torch.arange(SEQ)).expand(BATCH, SEQ, HIDDEN))
        return (
            self.head(self.norm(x)) + self.head(self.norm(y)) if False else (self.head(self.norm(x)), y.pow(2).sum(-1))
        )  # type: ignore[return-value]


def test_equal_names_are_told_apart_and_can_be_left_out_one_by_one() -> None:
    source = exported(made(TwoStreams()))
    plan = planned(source, kind="random-hadamard", rotations="R1", form="offline")
    names = [s.name for s in plan.spaces]
    assert len(set(names)) == len(names)
    for name in names if len(names) > 1 else []:
        after = spinpass.transform(source, plan=plan.without(name))
        assert spinpass.verify(source, after).ok
        found = spinpass.record.read(after)
        assert found is not None and set(found.rotations) == set(names) - {name}
    assert outcome(source, kind="random-hadamard").error <= 1e-9


def test_one_constant_is_never_rotated_twice_along_one_axis() -> None:
    """Every (constant, axis) belongs to one space."""
    for settings in (dict(qkv="grouped"), dict(tied=True), dict(parallel=True, positions=True)):
        plan = planned(program(**settings))
        for role in ("R2", "R4"):
            names = [w for s in plan.spaces if s.role == role for w in (*s.writers, *s.readers)]
            assert len(names) == len(set(names))


def test_tied_tables() -> None:
    tied = program(tied=True)
    keep, untie, auto = (planned(tied, rotations="R1", tied=t, form="offline") for t in ("keep", "untie", "auto"))
    assert len(keep.spaces[0].online) == 2 and keep.bytes_added == 0
    assert not untie.spaces[0].online and untie.bytes_added == VOCAB * HIDDEN * 8
    assert auto.bytes_added == 0  # the table is a large part of so small a model
    assert any("embed.weight kept" in n or "head.weight kept" in n for n in keep.spaces[0].notes)


def test_no_weight_is_read() -> None:
    """A plan of a program without weights."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder().eval()
        source = torch.export.export(model, (torch.zeros(2, 5, dtype=torch.int64),), strict=False)
    assert [s.role for s in planned(source).spaces] == ["R1", "R2", "R3", "R4"]


# -- what rotates for free beside the residual stream ----------------------------------------------------------------


class Beside(Decoder):
    """A latent behind a scaled norm, scores by einsum, a scaled norm over all heads, and a scan that reads what a linear
    layer reads."""

    def prepare(self) -> None:
        self.down, self.latent_norm, self.up = nn.Linear(HIDDEN, 12), RMSNorm(12), nn.Linear(12, HEADS * 8)
        self.q, self.k = nn.Linear(HIDDEN, HEADS * 8), nn.Linear(HIDDEN, HEADS * 8)
        self.sub_norm, self.o = RMSNorm(HEADS * 8), nn.Linear(HEADS * 8, HIDDEN)
        self.into, self.step, self.out = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, FFN), nn.Linear(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        q, k, v = (y.unflatten(-1, (HEADS, 8)) for y in (self.q(h), self.k(h), self.up(self.latent_norm(self.down(h)))))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        x = x + self.o(self.sub_norm(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)))
        u = nn.functional.silu(self.into(h))
        return x + self.out(torch.tanh(self.step(u)) * u.cumsum(1))


@pytest.fixture(scope="module")
def beside() -> ExportedProgram:
    return exported(made(Beside()))


def test_a_latent_is_found_behind_its_scaled_norm(beside: ExportedProgram) -> None:
    plan = planned(beside)
    latent = next(s for s in plan.spaces if "down.weight" in s.writers)
    assert (latent.role, latent.size, latent.readers, latent.online) == ("latent", 12, ("up.weight",), ())


def test_values_pass_a_scaled_norm_over_all_heads(beside: ExportedProgram) -> None:
    values = next(s for s in planned(beside).spaces if "up.weight" in s.writers)
    assert (values.role, values.size, values.readers, values.online) == ("R2", 8, ("o.weight",), ())


def test_queries_and_keys_of_an_einsum_fold(beside: ExportedProgram) -> None:
    queries = next(s for s in planned(beside).spaces if "q.weight" in s.writers)
    assert queries.role == "R3" and {"q.bias", "k.weight", "k.bias"} < set(queries.writers) and not queries.online


def test_a_value_that_others_read_too_is_rotated_for_its_linear_layer_alone(beside: ExportedProgram) -> None:
    step = next(s for s in planned(beside).spaces if "step.weight" in s.readers)
    assert (step.role, step.size, step.readers, len(step.online)) == ("R4", FFN, ("step.weight",), 1)


@pytest.mark.parametrize("form", ["offline", "online", "auto"])
def test_what_is_beside_the_stream_stays_exact(beside: ExportedProgram, form: str) -> None:
    config = RotationConfig(form=form, kind="random-hadamard", verify=False)  # type: ignore[arg-type]
    certificate = spinpass.verify(beside, spinpass.transform(beside, config))
    assert certificate.ok, str(certificate)


def test_without_r1_the_stream_is_no_latent(beside: ExportedProgram) -> None:
    plan = planned(beside, rotations=("R2", "latent"))
    assert {s.role for s in plan.spaces} == {"R2", "latent"}
    assert not any("embed.weight" in s.writers for s in plan.spaces)


# -- across heads ------------------------------------------------------------------------------------------------------


def test_all_heads_of_an_output_projection_are_rotated_together_where_asked() -> None:
    source = program(bias=True)
    assert not any(s.role == "heads" for s in planned(source).spaces), "not by default"
    spaces = {s.name: s for s in planned(source, rotations=("R2", "heads")).spaces}
    assert set(spaces) == {"R2:blocks.0.attn", "heads:blocks.0.attn.o"}
    across = spaces["heads:blocks.0.attn.o"]
    assert across.size == HEADS * 8 and across.form == "online" and across.readers == ("blocks.0.attn.o.weight",)
    assert across.flops == across.rotation.flops > 0


@pytest.mark.parametrize(
    ("rotations", "form"),
    [
        (("heads",), "auto"),
        (("R2", "heads"), "auto"),
        (("R1", "R2", "R3", "R4", "latent", "heads"), "offline"),
        (("R1", "R2", "R3", "R4", "latent", "heads"), "online"),
    ],
)
def test_a_rotation_across_heads_changes_nothing(rotations: tuple[str, ...], form: str) -> None:
    source = program(layers=2, bias=True)
    rotated = spinpass.transform(source, RotationConfig(rotations=rotations, form=form))  # type: ignore[arg-type]
    assert spinpass.verify(source, rotated).worst.float64.relative < 1e-12
    assert sum("hadamard" in str(n.target) for n in rotated.graph.nodes) >= 2, "one in front of each projection"


def test_a_single_head_is_rotated_by_r2_already() -> None:
    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))  # type: ignore[no-any-return]

    source = exported(OneHead(), (torch.randn(2, 5, 16, dtype=torch.float64),))
    found = planned(source, rotations=("R2", "heads"))
    assert [s.role for s in found.spaces] == ["R2"]
    assert any("already rotated by R2" in r.why for r in found.refusals)

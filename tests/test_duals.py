"""Queries and keys behind RoPE take any invertible matrix: keys A, and queries its inverse transposed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass import Rotation, RotationConfig, record
from spinpass.analysis.basis import group
from spinpass.analysis.basis.sides import Sides
from spinpass.certificate.programs import run, synthetic_inputs
from spinpass.errors import ConfigError, InvariantError, VerificationError
from spinpass.execution import into_basis
from spinpass.passes import insert_rotations
from spinpass.rotations import kronecker
from tests.support.decoders import Decoder, exported, made, relative_error, rope, tokens
from tests.support.kronecker import by_factors
from tests.support.programs import program

EXACT = 1e-9
R3 = RotationConfig(rotations="R3")
PROGRAMS = [("llama", "plain"), ("llama", "cache"), ("qwen3", "cache"), ("phi3", "plain"),
            ("gpt_neox", "static_decode")]  # fmt: skip


def asked(before: ExportedProgram) -> RotationConfig:
    matrices = by_factors(before, R3)
    assert matrices and not any(each.is_orthogonal for each in matrices.values())
    return RotationConfig(rotations="R3", matrices=matrices)


@pytest.mark.parametrize(("name", "how"), PROGRAMS, ids=lambda value: value)
def test_scores_stay_what_they_are(name: str, how: str) -> None:
    before = program(name, how)
    found = spinpass.rotate(before, asked(before))
    assert found.certificate is not None and found.certificate.ok
    assert {(s.form, s.group, len(s.online)) for s in found.plan.spaces} == {("online", "invertible", 2)}
    stored = {key.rpartition(".")[2] for key in (*found.program.state_dict, *found.program.constants) if "R3" in key}
    factors = range(1, 1 + len(found.plan.spaces[0].rotation.factors))
    assert stored == {f"factor{n}{form}" for n in factors for form in ("", "_dual")}
    if how == "plain":
        inputs = synthetic_inputs(before, seed=3)
        assert relative_error(run(before, inputs, float64=True), run(found.program, inputs, float64=True)) < EXACT


@pytest.mark.parametrize(
    "shape",
    [
        {"qkv": "fused", "heads": 4, "kv": 2},
        {"qkv": "grouped", "heads": 4, "kv": 1, "spelled": True},
        {"qk_norm": True, "heads": 6, "kv": 3, "bias": True, "spelled": True},
        {"head": 12, "layers": 2, "parallel": True},
        {"head": 96, "rope": True, "norm": "ln"},  # of two factors
    ],
    ids=str,
)
def test_however_heads_lie(shape: dict[str, Any]) -> None:
    before = exported(made(Decoder(**shape)))
    after = spinpass.transform(before, asked(before))
    for inputs in (before.example_inputs[0], (tokens(seed=5),)):
        assert relative_error(run(before, inputs, float64=True), run(after, inputs, float64=True)) < EXACT


def test_the_cache_of_keys_is_in_the_basis_that_is_given_and_has_a_way_back() -> None:
    before = program("llama", "cache")
    config = asked(before)
    after = spinpass.transform(before, config)
    told = record.read(after)
    assert told is not None and told.inputs and told.outputs
    again = record.Record.from_dict(json.loads(json.dumps(told.to_dict())))
    assert again == told and again.rotations == {key: each.fingerprint() for key, each in config.matrices.items()}  # type: ignore[union-attr]
    for carried in (*again.inputs.values(), *again.outputs.values()):
        assert carried.rotation == config.matrices[carried.space]
        x = torch.randn(2, 2, 5, carried.rotation.size, dtype=torch.float64)
        there = into_basis(x, carried)
        torch.testing.assert_close(there, x @ carried.rotation.matrix())
        torch.testing.assert_close(carried.applied(there, inverse=True), x)


def test_orthogonal_matrices_are_stored_once() -> None:
    """They are their own dual; factors are kept apart, because learning moves them."""
    before = program("llama")
    size = by_factors(before, R3).popitem()[1].size
    dense = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    after = spinpass.transform(before, RotationConfig(rotations="R3", matrices={"R3": dense}))
    added = [key for key in (*after.state_dict, *after.constants) if key.startswith("spinpass.")]
    assert len(added) == len(spinpass.plan(before, R3).spaces) and all(key.endswith(".matrix") for key in added)


def test_a_matrix_that_would_let_rounding_grow_is_refused() -> None:
    before = program("llama", dtype=torch.float32)
    size = by_factors(before, R3).popitem()[1].size
    steep = torch.diag(torch.logspace(0, -5, size, dtype=torch.float64))
    with pytest.raises(ConfigError, match="condition number of 1.0e\\+05, by which rounding of torch.float32 grows"):
        spinpass.transform(before, RotationConfig(rotations="R3", matrices={"R3": steep}))


# -- where a side meets itself, or something else reads it -------------------------------------------------------------


class Attend(nn.Module):
    """One attention of four heads behind RoPE, of which something is chosen."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.e, self.o, self.h = how, nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.sink = nn.Parameter(torch.randn(1, 4, 3, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = (t(x).unflatten(-1, (4, 8)).transpose(1, 2) for t in (self.q, self.k, self.v))
        if self.how == "turned together":
            q, k = rope(torch.cat([q, k], 1)).chunk(2, 1)
        elif self.how == "the same value":
            q = k = rope(k)
        else:
            q, k = rope(q), rope(k)
        if self.how == "normed behind":
            q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-5)
        if self.how == "keys with a constant":
            k = torch.cat([k, self.sink.expand(2, -1, -1, -1)], 2)
        scores = q @ k.transpose(2, 3)
        if self.how == "keys with keys":
            scores = scores + k @ k.transpose(2, 3)
        elif self.how == "queries with queries":
            scores = scores - 0.1 * q @ q.transpose(2, 3)
        elif self.how == "twice":
            scores = scores + (k @ q.transpose(2, 3)).transpose(2, 3) * 0.5
        elif self.how == "the other way round as well":
            scores = scores + k @ q.transpose(2, 3)
        elif self.how == "added":
            scores = scores + (q + k) @ k.transpose(2, 3)
        made = torch.softmax(scores, -1)[..., : x.shape[1]] @ v
        return self.h(x + self.o(made.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


ADMITTED = ("plain", "twice", "the other way round as well")
REFUSED = {
    "keys with keys": "would be on both sides of a product",
    "queries with queries": "would be on both sides of a product",
    "added": "would be on both sides of a product",
    "the same value": "would be on both sides of a product",
    "turned together": "would be on both sides of a product|cannot be told apart",
    "keys with a constant": "sink is not used in one way alone",
    "normed behind": "measures it|would be on both sides|multiplies two of its values",
}


@pytest.mark.parametrize("how", [*ADMITTED, *REFUSED])
def test_two_sides_or_orthogonal_matrices_alone(how: str) -> None:
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    before = torch.export.export(Attend(how).double().eval(), (ids,))
    plan = spinpass.plan(before, R3)
    assert len(plan.spaces) == 1 and plan.spaces[0].online, str(plan)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(8, dtype=torch.float64) + 0.3 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    config = RotationConfig(rotations="R3", matrices={"R3": Rotation.from_factors([matrix])})
    if how in ADMITTED:
        assert plan.spaces[0].group == "invertible", str(plan)
        after = spinpass.transform(before, config)
        assert relative_error(run(before, (ids,)), run(after, (ids,))) < EXACT
        return
    assert plan.spaces[0].group == "orthogonal"
    with pytest.raises(ConfigError, match=f"here only orthogonal ones change nothing: .*({REFUSED[how]})"):
        spinpass.transform(before, config)
    turned = RotationConfig(rotations="R3", matrices={"R3": torch.linalg.qr(matrix).Q})
    assert spinpass.rotate(before, turned).certificate.ok  # type: ignore[union-attr]


# -- broken on purpose -------------------------------------------------------------------------------------------------


def sides_with(change: Callable[[bool], bool]) -> Callable[[pytest.MonkeyPatch], None]:
    def broken(m: pytest.MonkeyPatch) -> None:
        real = group.by_sides

        def by_sides(*args: Any) -> Sides:
            found = real(*args)
            entries = tuple(replace(entry, dual=change(entry.dual)) for entry in found.entries)
            return replace(found, entries=entries)

        m.setattr(group, "by_sides", by_sides)

    return broken


def operands_with(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[pytest.MonkeyPatch], None]:
    def broken(m: pytest.MonkeyPatch) -> None:
        real = kronecker.right_operands

        def right_operands(factors: Any, *, inverse: bool, dual: bool) -> list[Tensor]:
            made = real(factors, inverse=inverse, dual=dual)
            return change(made) if dual else made

        m.setattr(kronecker, "right_operands", right_operands)

    return broken


BROKEN = {
    "queries take the keys' matrix": (sides_with(lambda dual: False), ("plain", "cache")),
    "both take the dual one": (sides_with(lambda dual: True), ("plain", "cache")),
    "the sides are swapped": (sides_with(lambda dual: not dual), ("cache",)),  # without a cache it is the same function
    "the inverse is not transposed": (operands_with(lambda made: [f.t() for f in made]), ("plain", "cache")),
    "one factor alone is inverted": (operands_with(lambda made: [f.inverse() for f in made[:-1]] + made[-1:]), ("plain",)),
    "the transpose is not inverted": (operands_with(lambda made: [f.inverse() for f in made]), ("plain",)),
}  # fmt: skip


@pytest.mark.parametrize(("how", "case"), [(how, case) for case, (_, hows) in BROKEN.items() for how in hows])
def test_the_certificate_sees_the_wrong_side(how: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = exported(made(Decoder(head=96))) if "one factor" in case else program("llama", how)
    config = asked(before)
    with monkeypatch.context() as patched:
        BROKEN[case][0](patched)
        with pytest.raises(VerificationError):
            spinpass.rotate(before, config)
    assert spinpass.rotate(before, config).certificate.ok  # type: ignore[union-attr]


def test_the_pass_counts_what_is_dual(monkeypatch: pytest.MonkeyPatch) -> None:
    before = program("llama")
    config = asked(before)
    real = insert_rotations.rotate_value

    def rotate_value(*args: Any, dual: bool, **options: Any) -> Any:
        return real(*args, **options)

    monkeypatch.setattr(insert_rotations, "rotate_value", rotate_value)
    with pytest.raises(InvariantError, match="0 products with dual factors were inserted, not . for each of 1 entries"):
        spinpass.plan(before, config)

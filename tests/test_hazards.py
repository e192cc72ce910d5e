"""Programs that other tools corrupt silently: each exact, or left alone where it must be with the reason in the plan, and rotated
everywhere else."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

import spinpass
from spinpass import record
from spinpass.errors import RefusedError
from spinpass.planning import RotationPlan
from tests import hazards, modules
from tests.decoders import (
    BATCH,
    FFN,
    HEAD,
    HIDDEN,
    KV,
    MLP,
    SEQ,
    Attention,
    Decoder,
    RMSNorm,
    exported,
    made,
    outcome,
    rope,
)

EXACT = 1e-9
# What stands in the plan (refusals, notes, reasons of online parts) with R1 offline: the barrier that the case is about. Cases that are
# not listed need no barrier: they fold.
REASONS = {
    "AlphaShift": "combined with other values",
    "AlphaShift2": "combined with other values",
    "SubShift": "combined with other values",
    "ExpandToken": "repeated",
    "BroadcastToken": "the same value to all channels",
    "ViewDtype": "bits as another type",
    "MatmulLeft": "no place for the norm's bias",
    "AddmmAlpha": "no place for the norm's bias",
    "ReturnsContext": "a program output",
    "ReturnsQ": "a program output",
    "Normalize": "multiplies channel by channel",
    "EarlyExit": "aten::tanh does not commute",
    "StreamScale": "its squares are summed",
    "Slice": "cuts through the axis",
    "SliceInside": "cuts through the axis",
    "OutputStream": "a program output",
    "Roll": "aten::roll does not commute",
    "MeanOut": "its mean over the channels is used",
    "MeanSub": "its mean over the channels is used",
    "MaxPool": "aten::amax does not commute",
    "GateByStream": "multiplies channel by channel",
    "SelfOuter": "two axes of matmul",
    "EmbNormed": "a norm with a scale per channel",
    "ScalarAdd": "the same value to all channels",
    "Concat": "concatenated with other values",
    "CosineSim": "aten::cosine_similarity does not",
    "Dist": "aten::cdist does not",
    "InPlaceSlice": "aten::select_scatter does not",
    "MaskTokens1": "the same value to all channels",
    "WhereChannel": "multiplies channel by channel",
    "Conv1dHead": "aten::conv1d does not",
    "Bilinear": "aten::bilinear does not",
    "QKShared": "R2 at .*multiplies channel by channel",
    "NormTwice": "its squares are summed",
    "NormScaleOut": "a program output",
    "Gather": "aten::gather does not",
    "ArgmaxC": "aten::argmax does not",
    "TopkC": "aten::topk does not",
    "GroupNormed": "aten::group_norm does not",
    "BF16Cache": "not floating point",
    "PartHeads": "part of the axis is summed over",
    "VNorm": "R2 at .*multiplies channel by channel",
    "ContextNorm": "R2 at .*multiplies channel by channel",
    "ContextGateChannel": "R2 at .*multiplies channel by channel",
    "VSharedWithKRope": "R2 at .*multiplies channel by channel",
    "HeadScaleVC": "R2 at .*multiplies channel by channel",
    "VRelu": "R2 at .*aten::relu does not",
    "ConvMix": "aten::conv1d does not",
    "CumsumChannel": "acts on the axis itself",
    "Hadamarded": "spinpass::hadamard does not",
    "Complex": "gather its channels",
    "StatsOut": "the statistics of",
    "SoftmaxC": "aten::softmax does not",
    "TwoStreams": "aten::sigmoid does not",
}
# Rotations that need not be found: everything else must be.
MISSING = {
    "HyperConn": {"R1", "R2", "R3"},
    "ReturnsContext": {"R2"},
    "QKShared": {"R2"},
    "AutocastRegion": {"R4"},
}  # its MLP is read inside a subgraph as well
FOLD = [n for n in hazards.ALL if n not in REASONS and n not in MISSING]


@cache
def program(name: str, decomposed: bool = False) -> ExportedProgram:
    return program(name).run_decompositions() if decomposed else exported(made(hazards.ALL[name]()))


def check(source: ExportedProgram, missing: set[str], **settings: Any) -> RotationPlan:
    found = outcome(source, **settings)
    assert found.error <= EXACT, str(found.plan)
    assert found.result is not None, found.refusal
    assert {"R1", "R2", "R3", "R4"} - missing <= found.roles(), str(found.plan)
    return found.plan


def reasons(plan: RotationPlan) -> str:
    return "\n".join(
        [
            *map(str, plan.refusals),
            *(n for s in plan.spaces for n in s.notes),
            *(p.why for s in plan.spaces for p in s.online),
        ]
    )




@pytest.mark.parametrize("name", list(hazards.ALL))
def test_a_hazard_is_exact_in_every_form(name: str) -> None:
    missing = MISSING.get(name, set())
    source = program(name)
    check(source, missing | {"R1"}, form="offline", tied="untie")
    check(source, missing | {"R1"}, form="offline", tied="keep", kind="random-hadamard")
    check(source, missing, form="online", kind="random-matrix")
    check(source, missing)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(hazards.ALL))
def test_a_hazard_is_exact_after_decomposition(name: str) -> None:
    missing = MISSING.get(name, set())
    for form in ("offline", "online"):
        check(program(name, True), missing | {"R1"}, form=form, kind="random-hadamard")


@pytest.mark.parametrize("name", REASONS)
def test_the_plan_names_the_barrier(name: str) -> None:
    import re

    plan = spinpass.plan(program(name), spinpass.RotationConfig(form="offline"))
    assert re.search(REASONS[name], reasons(plan)), reasons(plan) or str(plan)


@pytest.mark.parametrize(
    "name",
    [
        "LinearMixer",
        "LinearMixerBias",
        "ExpandScalar",
        "ValueHead",
        "SharedNorm",
        "SelfDot",
        "TwoEmb",
        "Router",
        "ConstVecAdd",
        "Negative",
        "ConcatRaw",
        "InPlace",
        "MaskTokens",
        "Where",
        "SharedLayers",
        "LoRA",
        "MoE",
        "EmbProj",
        "SharedBias",
        "NormBiasIsStream",
        "CrossLayerV",
        "TwoStreams2",
        "TokenScaleParam",
        "Dup",
    ],
)
def test_what_can_fold_folds(name: str) -> None:
    plan = spinpass.plan(program(name), spinpass.RotationConfig(rotations=("R1",), form="offline", tied="untie"))
    assert plan.spaces and not any(s.online for s in plan.spaces), str(plan)


# -- the cases of the issue, built by tests.modules ------------------------------------------------------------------------------------------


@cache
def listed(name: str) -> ExportedProgram:
    return modules.export(dtype=torch.float64, **modules.HAZARDS[name])


@pytest.mark.parametrize("form", ["offline", "online", "auto"])
@pytest.mark.parametrize("tied", ["keep", "untie"])
@pytest.mark.parametrize("name", modules.HAZARDS)
def test_the_listed_cases(name: str, form: str, tied: str) -> None:
    before = listed(name)
    after = spinpass.transform(
        before, spinpass.RotationConfig(form=form, tied=tied, kind="random-hadamard", verify=False)
    )  # type: ignore[arg-type]
    certificate = spinpass.verify(before, after)
    assert certificate.ok, str(certificate)
    found = record.read(after)
    assert found is not None
    assert {n.split(":")[0] for n in found.rotations} == {"R1", "R2", "R3", "R4"}


# -- state ------------------------------------------------------------------------------------------------------------------------------------


class Mutated(Decoder):
    """A cache given by the caller and written in place."""

    def prepare(self) -> None:
        self.second = Attention(self.s)

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.second.project(self.norm(x))
        where = start + torch.arange(ids.shape[1])
        keys.index_copy_(2, where, rope(k))
        values.index_copy_(2, where, v)
        mixed = F.scaled_dot_product_attention(rope(q), keys, values, enable_gqa=True)
        return self.finish(x + self.second.o(mixed.transpose(1, 2).flatten(2)))


def mutated() -> ExportedProgram:
    caches = [torch.randn(BATCH, KV, 16, HEAD, dtype=torch.float64) for _ in range(2)]
    return exported(made(Mutated()), (torch.zeros(BATCH, SEQ, dtype=torch.int64), *caches, torch.tensor(2)))


@pytest.mark.parametrize("cache_basis", ["rotated", "plain"])
def test_a_cache_written_in_place_passes_the_closed_loop(cache_basis: str) -> None:
    before = mutated()
    after = spinpass.transform(before, spinpass.RotationConfig(verify=False, kind="random-hadamard", cache=cache_basis))  # type: ignore[arg-type]
    certificate = spinpass.verify(before, after)
    assert certificate.ok and certificate.closed_loop_steps, str(certificate)
    found = record.read(after)
    assert found is not None and not found.outputs
    assert set(found.inputs) == ({"keys", "values"} if cache_basis == "rotated" else set())


@pytest.mark.parametrize("name", ["BufferCache2", "Shift"])
def test_state_in_buffers_stays_consistent_over_calls(name: str) -> None:
    """What the buffers hold at first is not zero."""
    before = program(name)
    for form in ("online", "offline"):
        after = spinpass.transform(before, spinpass.RotationConfig(verify=False, kind="random-hadamard", form=form))  # type: ignore[arg-type]
        certificate = spinpass.verify(before, after)
        assert certificate.ok and certificate.closed_loop_steps, str(certificate)


# -- near misses: a norm that is none, a stream that is none -------------------------------------------------------------------------------------


class Renormed(nn.Module):
    """Looks like a norm, but ``statistic`` says what is divided by."""

    def __init__(self, statistic: str) -> None:
        super().__init__()
        self.statistic = statistic
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        scale = {
            "absolute": lambda: x.abs().mean(-1, keepdim=True),
            "cubed": lambda: x.pow(3).mean(-1, keepdim=True).abs() + 1,
            "tokens": lambda: x.pow(2).mean(1, keepdim=True).sqrt(),
            "half": lambda: x[..., :12].pow(2).mean(-1, keepdim=True).sqrt(),
            "channels": lambda: x.pow(2).sqrt() + 1,
            "largest": lambda: x.amax(-1, keepdim=True).abs() + 1,
            "variance": lambda: x.var(-1, keepdim=True).sqrt(),
            "grouped": lambda: (
                x.unflatten(-1, (4, 6)).pow(2).mean(-1, keepdim=True).sqrt().expand(-1, -1, -1, 6).flatten(-2)
            ),
            "other": lambda: (x + self.weight).pow(2).mean(-1, keepdim=True).sqrt(),
            "shifted": lambda: (x + 1).pow(2).mean(-1, keepdim=True).sqrt(),
            "mean": lambda: (x - x.mean(1, keepdim=True)).pow(2).mean(-1, keepdim=True).sqrt(),
        }[self.statistic]()
        return x / scale * self.weight


@pytest.mark.parametrize(
    "statistic",
    ["absolute", "cubed", "tokens", "half", "channels", "largest", "variance", "grouped", "other", "shifted", "mean"],
)
def test_what_only_looks_like_a_norm(statistic: str) -> None:
    model = Decoder()
    model.norm = Renormed(statistic)
    source = exported(made(model))
    for form in ("offline", "online", "auto"):
        assert outcome(source, form=form).error <= EXACT
    folded = statistic in {"other", "mean"}
    plan = spinpass.plan(source, spinpass.RotationConfig(rotations=("R1",), form="offline"))
    assert folded != any(s.online for s in plan.spaces) or not plan.spaces, str(plan)


class MixedNorms(Decoder):
    """LayerNorms and an RMSNorm on one stream: it may not be centred."""

    def prepare(self) -> None:
        self.norm = RMSNorm(HIDDEN)


def test_a_stream_that_an_rms_norm_reads_too_is_not_centred() -> None:
    source = exported(made(MixedNorms(norm="ln")))
    found = outcome(source, form="offline")
    assert found.error <= EXACT
    assert "cannot be centred" in reasons(found.plan)


class CentredExit(Decoder):
    """A LayerNorm stream whose raw value is read as well."""

    def prepare(self) -> None:
        self.value = nn.Linear(HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        return super().finish(x), self.value(x)


def test_a_stream_of_layer_norms_with_a_raw_reader() -> None:
    source = exported(made(CentredExit(norm="ln", bias=True)))
    for form in ("offline", "online", "auto"):
        assert outcome(source, form=form).error <= EXACT


def test_without_r1_layer_norm_models_keep_their_norms() -> None:
    source = exported(made(Decoder(norm="ln", bias=True)))
    after = spinpass.transform(source, spinpass.RotationConfig(rotations=("R2", "R3", "R4")))
    kinds = [str(n.target) for n in after.graph.nodes if "norm" in str(n.target)]
    assert kinds == [str(n.target) for n in source.graph.nodes if "norm" in str(n.target)]


class Bare(nn.Module):
    """An MLP that adds to nothing: no stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(40, HIDDEN), MLP(Decoder().s)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.embed(ids))


def test_an_mlp_alone_gets_r4_and_says_what_it_lacks() -> None:
    found = outcome(exported(made(Bare())))
    assert found.error <= EXACT and found.roles() == {"R4"}
    assert all(f"{r}: the program has no" in found.reasons() for r in ("R1", "R2", "R3"))
    with pytest.raises(RefusedError, match="R2: the program has no attention"):
        spinpass.transform(exported(made(Bare())), spinpass.RotationConfig(rotations=("R2",)))


def test_an_odd_width_refuses_with_the_width() -> None:
    model = made(Decoder(hidden=25, ffn=FFN))
    plan = spinpass.plan(exported(model), spinpass.RotationConfig(rotations=("R1",), form="offline"))
    assert "no Hadamard order above 1 divides 25" in reasons(plan)
    assert outcome(exported(model), kind="random-matrix").roles() == {"R1", "R2", "R3", "R4"}

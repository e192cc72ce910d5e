"""Near misses: a norm that is none, a stream that is none, a width that has no Hadamard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spinpass
from spinpass.errors import RefusedError
from tests.mutations.oracle import EXACT, reasons
from tests.support.decoders import FFN, HIDDEN, MLP, Decoder, RMSNorm, exported, made, outcome


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
    assert found.error <= EXACT and found.roles() == {"R4", "latent"}
    assert all(f"{r}: the program has no" in found.reasons() for r in ("R1", "R2", "R3"))
    with pytest.raises(RefusedError, match="R2: the program has no attention"):
        spinpass.transform(exported(made(Bare())), spinpass.RotationConfig(rotations=("R2",)))


def test_an_odd_width_refuses_with_the_width() -> None:
    model = made(Decoder(hidden=25, ffn=FFN))
    plan = spinpass.plan(exported(model), spinpass.RotationConfig(rotations=("R1",), form="offline"))
    assert "no Hadamard order above 1 divides 25" in reasons(plan)
    assert outcome(exported(model), kind="random-matrix").roles() == {"R1", "R2", "R3", "R4"}

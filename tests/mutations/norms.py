"""Norms: where they stand, how they are spelled, what shares them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, VOCAB, RMSNorm, Shape


class AlphaShift(Hazard):
    """A norm's bias added with a factor."""

    folds = True

    def prepare(self) -> None:
        self.g = param(HIDDEN)
        self.b = param(HIDDEN)
        self.rn = RMSNorm(HIDDEN, weight=False)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.add(self.rn(x) * self.g, self.b, alpha=2.0))


class AlphaShift2(Hazard):
    """A norm's bias that the scaled value is added to with a factor."""

    folds = True

    def prepare(self) -> None:
        self.g = param(HIDDEN)
        self.b = param(HIDDEN)
        self.rn = RMSNorm(HIDDEN, weight=False)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.add(self.b, self.rn(x) * self.g, alpha=2.0))


class SubShift(Hazard):
    """A norm's bias with the opposite sign."""

    folds = True

    def prepare(self) -> None:
        self.g = param(HIDDEN)
        self.b = param(HIDDEN)
        self.rn = RMSNorm(HIDDEN, weight=False)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.sub(self.rn(x) * self.g, self.b))


class MatmulLeft(Hazard):
    """A weight on the left of a matmul, behind a norm with bias."""

    reason = "no place for the norm's bias"

    shape = Shape(norm="ln")

    def prepare(self) -> None:
        self.W = param(HIDDEN, HIDDEN)
        self.ln = nn.LayerNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        y = torch.matmul(self.W, self.ln(x).transpose(1, 2))
        return (self.head(self.norm(x)), y)


class AddmmAlpha(Hazard):
    """Addmm with factors behind a norm with bias."""

    reason = "no place for the norm's bias"

    shape = Shape(norm="ln")

    def prepare(self) -> None:
        self.W = param(HIDDEN, VOCAB)
        self.b = param(VOCAB)
        self.ln = nn.LayerNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return torch.addmm(self.b, self.ln(x).flatten(0, 1), self.W, beta=3.0, alpha=2.0)


class Normalize(Hazard):
    """F.normalize as the norm."""

    reason = "multiplies channel by channel"

    def finish(self, x: Tensor) -> Any:
        return self.head(F.normalize(x, dim=-1))


class SharedNorm(Hazard):
    """One norm weight for all norms."""

    folds = True

    def prepare(self) -> None:
        for b in self.blocks:
            b.norm2.weight = b.norm1.weight
        self.norm.weight = self.blocks[0].norm1.weight


class NormTwice(Hazard):
    """A norm of a norm."""

    reason = "its squares are summed"

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(self.norm(x)))


class NormScaleOut(Hazard):
    """The scaled norm is an output."""

    reason = "a program output"

    def finish(self, x: Tensor) -> Any:
        y = self.norm(x)
        return (self.head(y), y)


class EmbNormed(Hazard):
    """A norm behind the embedding."""

    reason = "a norm with a scale per channel"

    def prepare(self) -> None:
        self.en = nn.LayerNorm(HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.en(self.embed(ids))


class MeanSub(Hazard):
    """The centred stream is an output of an RMSNorm model."""

    reason = "its mean over the channels is used"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x - x.mean(-1, keepdim=True))


class StatsOut(Hazard):
    """A norm's statistics are outputs."""

    reason = "the statistics of"

    def finish(self, x: Tensor) -> Any:
        y, m, r = torch.native_layer_norm(x, [HIDDEN], None, None, 1e-05)
        return (self.head(self.norm(x)), self.head(y), m, r)


class NormBiasIsStream(Hazard):
    """Norm weight also added to the stream."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x + self.norm.weight))


class HeadBias(Hazard):
    """Two heads that share a bias."""

    folds = True

    def prepare(self) -> None:
        self.hb = nn.Linear(HIDDEN, VOCAB, bias=True)

    shape = Shape(norm="ln", bias=True)

    def finish(self, x: Tensor) -> Any:
        return (self.hb(self.norm(x)), F.linear(self.norm(x), self.embed.weight, self.hb.bias))


class SharedBias(Hazard):
    """One bias for two linears and a norm."""

    folds = True

    shape = Shape(norm="ln", bias=True)

    def prepare(self) -> None:
        self.blocks[0].attn.o.bias = self.blocks[0].mlp.down.bias
        self.blocks[0].norm1.bias = self.blocks[0].mlp.down.bias

"""Residuals that are gated, scaled, averaged and dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, Shape


class HighwayTokens(Hazard):
    """A residual gated token by token: both sides share the gate."""

    folds = True

    def prepare(self) -> None:
        self.gate = nn.Linear(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        g = torch.sigmoid(self.gate(h))
        return g * x + (1 - g) * self.blocks[layer].mlp(h)


class HighwayChannels(Hazard):
    """A residual gated channel by channel."""

    reason = "channel by channel"

    def prepare(self) -> None:
        self.gate = nn.Linear(HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        g = torch.sigmoid(self.gate(h))
        return torch.lerp(x, self.blocks[layer].mlp(h), g)


class ScalarGate(Hazard):
    """A learned number behind a tanh gates a branch (Flamingo), a scale per block of channels the other."""

    reason = "channel by channel"

    def prepare(self) -> None:
        self.alpha = nn.Parameter(torch.tensor(1.0))
        self.blockwise = param(4, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].mlp(self.blocks[layer].norm2(x))
        x = x + torch.tanh(self.alpha) * h
        return x + (h.unflatten(-1, (4, 6)) * self.blockwise).flatten(-2)


class StochasticDepth(Hazard):
    """Drop path left in: it draws at run time and keeps every sample."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        keep = (1.0 + torch.rand(x.shape[0], 1, 1, dtype=x.dtype)).floor()
        return x + self.blocks[layer].mlp(self.blocks[layer].norm2(x)) / 1.0 * keep


class DropoutLeft(Hazard):
    """Dropout left in, and a branch scaled by the odds of keeping it."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = F.dropout(self.blocks[layer].mlp(self.blocks[layer].norm2(x)), 0.1, training=False)
        return torch.add(F.dropout(x, 0.1, training=False), y, alpha=0.9)


class ReversedSubtraction(Hazard):
    """f(x) − x, spelled with rsub."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.rsub(x, self.blocks[layer].mlp(self.blocks[layer].norm2(x)))


class FusedMultiplyAdd(Hazard):
    """Layer scale and sum as one operator."""

    def prepare(self) -> None:
        self.ls = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.addcmul(x, self.ls, self.blocks[layer].mlp(self.blocks[layer].norm2(x)), value=0.7)


class LerpByNumber(Hazard):
    """A running average of stream and branch."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.lerp(x, self.blocks[layer].mlp(self.blocks[layer].norm2(x)), 0.3)


class DeepNorm(Hazard):
    """norm(αx + f(x)): the stream is what comes out of norms."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return self.norm(x * 1.7 + self.blocks[layer].mlp(x))


class LayersWeighted(Hazard):
    """A learned average of the stream at all layers is what the head reads."""

    shape = Shape(layers=2)
    folds = True

    def prepare(self) -> None:
        self.share = param(3)

    def forward(self, ids: Tensor) -> Any:
        seen = [self.embedded(ids)]
        for block in self.blocks:
            seen.append(block(seen[-1]))
        share = torch.softmax(self.share, 0)
        return self.finish(sum(share[i] * x for i, x in enumerate(seen)))


class Clamped(Hazard):
    """The stream is kept in range, and freed of what is not a number."""

    reason = "aten::clamp does not"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.nan_to_num(x.clamp(-3.0, 3.0))


class TwoTermSum(Hazard):
    """Sums spelled with sum, stack and add of three."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        parts = torch.stack([x, self.blocks[layer].mlp(h), self.blocks[layer].attn(h)], 0)
        return parts.sum(0)


class LateSkip(Hazard):
    """The embedding comes back at the end through a linear layer (U-Net), and once more as it is."""

    folds = True

    def prepare(self) -> None:
        self.skip = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, ids: Tensor) -> Any:
        e = self.embedded(ids)
        x = self.blocks[0](e)
        return self.finish(self.skip(torch.cat([x, e], -1)) + e)


class GateByStream(Hazard):
    """The stream is gated channel by channel."""

    reason = "multiplies channel by channel"

    def prepare(self) -> None:
        self.g = nn.Linear(HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x * torch.sigmoid(self.g(x))


class LayerScale(Hazard):
    """A scale per channel on a branch."""

    folds = True

    def prepare(self) -> None:
        self.ls = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.ls * self.blocks[0].mlp(self.blocks[0].norm2(x))


class StreamScale(Hazard):
    """A scale per channel on the stream."""

    reason = "its squares are summed"

    def prepare(self) -> None:
        self.ls = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x * self.ls


class TokenScaleParam(Hazard):
    """Learned numbers as multipliers."""

    folds = True

    def prepare(self) -> None:
        self.a = nn.Parameter(torch.tensor(1.0))
        self.b = param(1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x * self.a + self.b * self.blocks[layer].mlp(self.blocks[layer].norm2(x))

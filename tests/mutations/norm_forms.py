"""Norms in other places, of other forms, with other readers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import BATCH, HIDDEN, RMSNorm, Shape, tokens


class PostNorm(Hazard):
    """Norms behind the sums: what is summed next is a norm's output."""

    shape = Shape(norm="ln", bias=True)
    reason = "a norm with a scale per channel"

    def forward(self, ids: Tensor) -> Any:
        b, x = self.blocks[0], self.embedded(ids)
        x = b.norm1(x + b.attn(x))
        x = b.norm2(x + b.mlp(x))
        return self.head(x)


class Sandwich(Hazard):
    """Norms on both sides of every branch."""

    shape = Shape(post_norm=True)


class ParallelBlock(Hazard):
    """Attention and MLP read one norm, with a bias, and are summed at once."""

    shape = Shape(norm="ln", bias=True)
    folds = True

    def forward(self, ids: Tensor) -> Any:
        b, x = self.blocks[0], self.embedded(ids)
        h = b.norm1(x)
        return self.finish(x + b.attn(h) + b.mlp(h))


class LayerNormWithoutBias(Hazard):
    """Scale, no bias."""

    shape = Shape(norm="ln_nobias", bias=True)
    folds = True


class SpelledOutLayerNorm(Hazard):
    """LayerNorm out of elementary operators, everything biased, tied."""

    shape = Shape(norm="ln_spelled", bias=True, tied=True)


class BiasOnly(Hazard):
    """A norm with a bias and no scale."""

    folds = True

    def prepare(self) -> None:
        self.shift = nn.ParameterDict({"bias": param(HIDDEN)})

    def finish(self, x: Tensor) -> Any:
        return self.head(F.rms_norm(x, (HIDDEN,)) + self.shift["bias"])


class NormReadTwice(Hazard):
    """A norm's output is read by linears and added to the stream as well."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        return h + self.blocks[layer].mlp(h)


class NormsInATable(Hazard):
    """The scales of all norms are the rows of one parameter."""

    def prepare(self) -> None:
        self.scales = param(2, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x + self.blocks[layer].mlp(F.rms_norm(x, (HIDDEN,)) * self.scales[0])
        return x + self.blocks[layer].attn(F.rms_norm(x, (HIDDEN,), self.scales[1]))


class OneReaderTwoScales(Hazard):
    """One linear behind two norms of different scales."""

    folds = True
    missing = "R1"

    def between(self, x: Tensor, layer: int) -> Tensor:
        b = self.blocks[layer]
        return x + b.mlp.up(b.norm1(x))[..., :HIDDEN] + b.mlp.up(b.norm2(x))[..., :HIDDEN]


class AdaptiveNorm(Hazard):
    """Scale and shift come from another input (AdaLN)."""

    reason = "channel by channel"

    def prepare(self) -> None:
        self.condition = nn.Linear(3, 2 * HIDDEN)

    def forward(self, ids: Tensor, time: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        scale, shift = self.condition(time)[:, None].chunk(2, -1)
        h = F.layer_norm(x, (HIDDEN,)) * (1 + scale) + shift
        return self.finish(x + self.blocks[0].mlp(h))

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), torch.randn(BATCH, 3, dtype=torch.float64)


class AdaptiveByToken(Hazard):
    """A norm times a number per token that comes from another input."""

    def prepare(self) -> None:
        self.condition = nn.Linear(3, 1)

    def forward(self, ids: Tensor, time: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        h = self.norm(x) * self.condition(time)[:, None]
        return self.head(h)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), torch.randn(BATCH, 3, dtype=torch.float64)


class UnitStream(Hazard):
    """The stream is a unit vector after every sum, steps are scaled per channel (nGPT)."""

    def prepare(self) -> None:
        self.alpha = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x / x.norm(dim=-1, keepdim=True)
        step = self.blocks[layer].mlp(x)
        step = step * torch.rsqrt(step.square().sum(-1, keepdim=True))
        x = x + self.alpha * (step - x)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class ScaleNorm(Hazard):
    """One learned number for all channels, eps by clamping."""

    folds = True

    def prepare(self) -> None:
        self.g = nn.Parameter(torch.tensor(2.0))

    def finish(self, x: Tensor) -> Any:
        return self.head(x * self.g / x.norm(dim=-1, keepdim=True).clamp_min(1e-5))


class DynamicTanh(Hazard):
    """tanh(αx)·g + b in place of a norm."""

    reason = "aten::tanh does not"

    def prepare(self) -> None:
        self.a, self.g, self.b = nn.Parameter(torch.tensor(0.5)), param(HIDDEN), param(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.a * x) * self.g + self.b)


class BatchNormed(Hazard):
    """Batch norm over channels, at inference."""

    def prepare(self) -> None:
        self.bn = nn.BatchNorm1d(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.blocks[layer].mlp(self.bn(x.flatten(0, 1)).view_as(x))


class VarianceMeanNorm(Hazard):
    """LayerNorm out of var_mean."""

    def finish(self, x: Tensor) -> Any:
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return self.head((x - mean) * torch.rsqrt(var + 1e-5))


class SquaresMinusSquare(Hazard):
    """LayerNorm out of E[x²] − E[x]²."""

    reason = "its mean over the channels is used"

    def finish(self, x: Tensor) -> Any:
        mean = x.mean(-1, keepdim=True)
        return self.head((x - mean) * torch.rsqrt(x.square().mean(-1, keepdim=True) - mean.square() + 1e-5))


class CastNorm(Hazard):
    """Scale applied in float32 on one norm, after the cast back on another."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        wide = x.float()
        h = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.head((h * self.norm.weight.float()).to(x.dtype)), self.head(self.norm.weight * h.to(x.dtype))


class NormOverHeads(Hazard):
    """Groups of channels of the stream are normed apart, with a scale."""

    reason = "squares it channel by channel"

    def prepare(self) -> None:
        self.hn = RMSNorm(6)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.blocks[layer].mlp(self.hn(x.unflatten(-1, (4, 6))).flatten(-2))


class NormTwiceApart(Hazard):
    """One norm module, applied to the stream and to a branch."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        b = self.blocks[layer]
        return x + b.norm2(b.mlp(b.norm2(x)))


class Merged(Hazard):
    """Neighbouring tokens of a LayerNorm stream are merged into one vector, which is normed as a whole (pixel shuffle)."""

    shape = Shape(norm="ln", bias=True)

    def prepare(self) -> None:
        self.wide, self.merge = nn.LayerNorm(2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        pairs = x[:, :4].reshape(BATCH, 2, 2 * HIDDEN)
        return self.head(self.norm(x)), self.merge(self.wide(pairs))


class MergedBehindNorm(Hazard):
    """The same behind the stream's own norm, whose bias every half of the merged vector has; read as it is."""

    shape = Shape(norm="ln", bias=True)

    def prepare(self) -> None:
        self.merge = nn.Linear(2 * HIDDEN, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return self.head(h), self.merge(h[:, :4].reshape(BATCH, 2, 2 * HIDDEN))


class TransposedInput(Hazard):
    """A linear contracts the tokens of a normed stream, not its channels (token mixing)."""

    def prepare(self) -> None:
        self.mix = nn.Linear(5, 5)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mix(self.blocks[layer].norm2(x).mT).mT

"""What is added to the residual stream, and how it is scaled, masked and carried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, SEQ, Shape


class LinearMixer(Hazard):
    """W reads and writes the stream, no bias; LN with bias."""

    folds = True

    shape = Shape(norm="ln")

    def prepare(self) -> None:
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mn = nn.LayerNorm(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mix(self.mn(x))


class LinearMixerBias(Hazard):
    """The same with a bias."""

    folds = True

    shape = Shape(norm="ln")

    def prepare(self) -> None:
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=True)
        self.mn = nn.LayerNorm(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mix(self.mn(x))


class Dup(Hazard):
    """The stream plus itself."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + x


class ScalarAdd(Hazard):
    """One added to all channels."""

    reason = "the same value to all channels"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + 1.0


class ConstVecAdd(Hazard):
    """A learned vector added."""

    folds = True

    def prepare(self) -> None:
        self.c = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.c


class Negative(Hazard):
    """Signs."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        return -x - self.blocks[layer].mlp(self.blocks[layer].norm2(x))


class InPlace(Hazard):
    """An in-place sum."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x.clone()
        x.add_(self.blocks[layer].mlp(self.blocks[layer].norm2(x)))
        return x


class InPlaceSlice(Hazard):
    """Channels written in place."""

    reason = "adds the same value to all channels"

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x.clone()
        x[:, 0] += 1.0
        x[..., 3] = 0.5
        return x


class ExpandToken(Hazard):
    """Per token bias expanded over channels."""

    reason = "repeated"

    def prepare(self) -> None:
        self.tb = nn.Linear(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.tb(x).expand_as(x)


class ExpandScalar(Hazard):
    """One learned number added to all channels, expanded."""

    folds = True

    def prepare(self) -> None:
        self.c = nn.Parameter(torch.tensor(1.0))

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.c.expand(x.shape)


class ExpandTokenConst(Hazard):
    """One constant per position added to all channels."""

    folds = True

    def prepare(self) -> None:
        self.c = param(SEQ, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.c.expand(SEQ, HIDDEN)


class BroadcastToken(Hazard):
    """One computed number per token added to all channels."""

    reason = "the same value to all channels"

    def prepare(self) -> None:
        self.tb = nn.Linear(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.tb(x)


class Where(Hazard):
    """Tokens replaced by a learned vector."""

    folds = True

    def prepare(self) -> None:
        self.c = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.where((torch.arange(SEQ) > 2)[None, :, None], x, self.c)


class WhereChannel(Hazard):
    """Channels replaced."""

    reason = "multiplies channel by channel"

    def prepare(self) -> None:
        self.c = param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.where((torch.arange(HIDDEN) > 2)[None, None, :], x, self.c)


class MaskTokens(Hazard):
    """Tokens set to zero."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.masked_fill((torch.arange(SEQ) > 2)[None, :, None], 0.0)))


class MaskTokens1(Hazard):
    """Tokens set to a number."""

    reason = "the same value to all channels"

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.masked_fill((torch.arange(SEQ) > 2)[None, :, None], 1.5)))


class EmptySlice(Hazard):
    """No tokens at all are joined to the tokens."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.cat([x, self.blocks[layer].mlp(x)[:, :0]], 1)


class SharedLayers(Hazard):
    """One layer applied three times."""

    folds = True

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.finish(x)

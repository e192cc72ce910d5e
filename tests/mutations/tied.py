"""Tables that are heads as well: under two and three names, in slices, scaled, behind norms of all kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, VOCAB, RMSNorm, Shape


class TiedPlainLN(Hazard):
    """A tied table, norms without parameters."""

    folds = True
    shape = Shape(norm="ln_plain", tied=True)


class TiedLN(Hazard):
    """A tied table, LayerNorm."""

    folds = True
    shape = Shape(norm="ln", tied=True)


class TiedThreeNames(Hazard):
    """One table is the embedding, the head and the head of a second output."""

    folds = True
    shape = Shape(tied=True)

    def prepare(self) -> None:
        self.second = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.second.weight = self.embed.weight
        self.n2 = RMSNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x)), self.second(self.n2(x))


class TiedTwoBlocks(Hazard):
    """A tied table, and two layers that share their weights under two names."""

    shape = Shape(tied=True, layers=2)

    def prepare(self) -> None:
        self.blocks[1].mlp, self.blocks[1].attn.o.weight = self.blocks[0].mlp, self.blocks[0].attn.o.weight


class HeadOnASlice(Hazard):
    """The head is the first rows of the table."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return F.linear(self.norm(x), self.embed.weight[:30])


class HeadOnSlices(Hazard):
    """Two heads on overlapping rows, one behind another norm."""

    folds = True

    def prepare(self) -> None:
        self.n2 = RMSNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        table = self.embed.weight
        return self.norm(x) @ table[5:].t(), F.linear(self.n2(x), torch.cat([table[:3], table[30:]]))


class HeadOnChannels(Hazard):
    """The head reads some channels of the table with a projection of the stream."""

    folds = True

    def prepare(self) -> None:
        self.small = nn.Linear(HIDDEN, 10)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x)), self.small(self.norm(x)) @ self.embed.weight[:, :10].t()


class TiedTransposed(Hazard):
    """Logits as x Eᵀ and as an einsum, scaled, capped, with a bias."""

    def prepare(self) -> None:
        self.bias = param(VOCAB)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) * HIDDEN**0.5

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x) / HIDDEN**0.5
        capped = 3 * torch.tanh(h @ self.embed.weight.T / 3)
        return capped, torch.einsum("bsd,vd->bsv", h, self.embed.weight) + self.bias


class TiedProjections(Hazard):
    """A narrow table behind a projection, both tied with the head (OPT)."""

    folds = True

    def prepare(self) -> None:
        self.narrow, self.up = nn.Embedding(VOCAB, 10), nn.Linear(10, HIDDEN, bias=False)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.up(self.narrow(ids))

    def finish(self, x: Tensor) -> Any:
        return F.linear(F.linear(self.norm(x), self.up.weight.t()), self.narrow.weight)


class TableScaledByRow(Hazard):
    """Every row of the tied table is divided by its norm where it is a head."""

    folds = True
    shape = Shape(tied=True)

    def finish(self, x: Tensor) -> Any:
        table = self.embed.weight
        return F.linear(self.norm(x), table / table.norm(dim=1, keepdim=True))


class TiedBehindBias(Hazard):
    """A tied table in a stream of LayerNorms spelled out: the head reads a shifted, uncentred value."""

    shape = Shape(norm="ln_spelled", tied=True)


class TiedBehindLinear(Hazard):
    """A tied table in a stream of bare LayerNorms: a second head reads what a linear has written, uncentred."""

    shape = Shape(norm="ln_plain", tied=True)

    def prepare(self) -> None:
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return self.head(h), self.head(self.mix(h))


class TiedBehindSum(Hazard):
    """The same: the head reads the norm's output plus another vector of the table."""

    shape = Shape(norm="ln_plain", tied=True)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x) + self.embed.weight[3])


class TiedToRawReader(Hazard):
    """The same: the head reads the raw stream of LayerNorms."""

    shape = Shape(norm="ln_plain", tied=True)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x)), self.head(x)

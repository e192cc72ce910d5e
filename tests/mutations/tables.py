"""Embedding tables and heads: tied, sliced, factorised, looked up in several ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, VOCAB, RMSNorm, Shape, tokens


class TwoEmb(Hazard):
    """Same table looked up twice."""

    folds = True

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + 0.5 * self.embed(ids.flip(1))


class EmbAsOutputTarget(Hazard):
    """The table is an output."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.embed.weight * 2)


class EmbProj(Hazard):
    """Factorised embedding."""

    folds = True

    def prepare(self) -> None:
        self.e2 = nn.Embedding(VOCAB, 10)
        self.pr = nn.Linear(10, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.pr(self.e2(ids))


class EmbCast(Hazard):
    """A table cast to and fro."""

    folds = True

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids).float().double()


class AdaptiveTable(Hazard):
    """Rare tokens have a narrow table and a projection of their own; zeros stand where the other one speaks."""

    folds = True

    def prepare(self) -> None:
        self.rare, self.up = nn.Embedding(VOCAB, 10), nn.Linear(10, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        common = (ids < 20)[..., None]
        zero = torch.zeros((), dtype=torch.float64)
        return torch.where(common, self.embed(ids), zero) + torch.where(common, zero, self.up(self.rare(ids)))


class Positions(Hazard):
    """Learned positions cut from a table, token types, fixed sinusoids, an expanded start vector."""

    folds = True

    def prepare(self) -> None:
        self.places, self.types, self.start = param(9, HIDDEN), nn.Embedding(2, HIDDEN), param(1, 1, HIDDEN)
        angles = torch.arange(9)[:, None] / 10 ** torch.arange(HIDDEN)
        self.register_buffer("waves", angles.sin(), persistent=False)

    def embedded(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[None, : ids.shape[1]] + self.types(ids % 2) + self.waves[: ids.shape[1]]
        return x + self.start


class ComputedPositions(Hazard):
    """Sinusoids computed from the positions at run time."""

    def embedded(self, ids: Tensor) -> Tensor:
        angles = ids.cumsum(1)[..., None].double() / 10 ** torch.arange(HIDDEN // 2).double()
        return self.embed(ids) + torch.cat([angles.sin(), angles.cos()], -1)


class Lookups(Hazard):
    """The table looked up by index, by index_select, by gather of rows and as a product with one-hot vectors."""

    folds = True

    def embedded(self, ids: Tensor) -> Tensor:
        table = self.embed.weight
        x = table[ids] + table.index_select(0, ids.flatten()).view(*ids.shape, HIDDEN)
        return x + F.one_hot(ids, VOCAB).double() @ table


class Bag(Hazard):
    """Rows of a table are averaged by embedding_bag."""

    def prepare(self) -> None:
        self.bag = nn.EmbeddingBag(VOCAB, HIDDEN, mode="mean")

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.bag(ids)[:, None]


class HashedTables(Hazard):
    """Tables of pairs of tokens beside the table of tokens."""

    folds = True

    def prepare(self) -> None:
        self.pairs = nn.Embedding(17, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        before = F.pad(ids, (1, 0))[:, :-1]
        return self.embed(ids) + self.pairs((ids * 31 + before) % 17)


class Codebooks(Hazard):
    """Several codebooks are summed at the input and have a head each, stacked in one parameter."""

    reason = "two computed values are contracted"

    def prepare(self) -> None:
        self.books, self.heads = nn.ModuleList(nn.Embedding(VOCAB, HIDDEN) for _ in range(3)), param(3, VOCAB, HIDDEN)

    def forward(self, codes: Tensor) -> Any:
        x = sum(book(codes[:, i]) for i, book in enumerate(self.books))
        h = self.norm(self.blocks[0](x))
        return torch.einsum("bsd,kvd->bksv", h, self.heads), torch.stack([h @ w.t() for w in self.heads], 1)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return (torch.stack([tokens(seed=i) for i in range(3)], 1),)


class OffsetTable(Hazard):
    """One long table for all codebooks, addressed by offsets, summed over an axis."""

    folds = True

    def embedded(self, ids: Tensor) -> Tensor:
        offsets = torch.tensor([0, 10])
        return self.embed(ids[..., None] % 20 + offsets).sum(2)


class SoftLookup(Hazard):
    """The table is read by the stream and written back in the same basis: a memory of rows."""

    folds = True

    def prepare(self) -> None:
        self.memory = param(9, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        weights = torch.softmax(F.rms_norm(x, (HIDDEN,)) @ self.memory.t(), -1)
        return x + weights @ self.memory


class PerLayerTables(Hazard):
    """A second table with a narrow vector per layer, gated by the stream and added to it (Gemma 3n)."""

    shape = Shape(layers=2)

    def prepare(self) -> None:
        self.small = nn.Embedding(VOCAB, 2 * 6)
        self.gate, self.project = nn.Linear(HIDDEN, 6, bias=False), nn.Linear(6, HIDDEN, bias=False)
        self.from_stream, self.pn = nn.Linear(HIDDEN, 2 * 6, bias=False), RMSNorm(6)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        each = self.pn(self.from_stream(x).unflatten(-1, (2, 6))) + self.small(ids).unflatten(-1, (2, 6)) * 6**0.5
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = x + self.norm(self.project(F.gelu(self.gate(x)) * each[:, :, i] * 0.5))
        return self.finish(x)


class LowRankHead(Hazard):
    """A head of two factors, and a head whose weight is their product."""

    folds = True

    def prepare(self) -> None:
        self.a, self.b = param(6, HIDDEN), param(VOCAB, 6)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return F.linear(F.linear(h, self.a), self.b), F.linear(h, self.b @ self.a)

"""The residual concatenated, split, permuted, reshaped to heads and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import HIDDEN, MLP, RMSNorm, Shape

HALF = HIDDEN // 2


class HeadsAndBack(Hazard):
    """The stream seen as heads, axes moved, and put together again as it was."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        heads = x.view(*x.shape[:2], 4, 6).permute(0, 2, 3, 1)
        back = heads.transpose(1, 2).transpose(1, 2).permute(0, 3, 1, 2).reshape(x.shape)
        return back + self.blocks[layer].mlp(self.blocks[layer].norm2(back))


class HeadsTransposed(Hazard):
    """The stream seen as heads and put together in another order, read by linears in that order."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        other = self.blocks[layer].norm2(x).unflatten(-1, (4, 6)).transpose(-1, -2).flatten(-2)
        return x + self.blocks[layer].mlp(other)


class StreamTransposed(Hazard):
    """The stream itself goes on in another order of its channels."""

    reason = "it multiplies channel by channel"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x.unflatten(-1, (4, 6)).transpose(-1, -2).flatten(-2)


class PermutedAndBack(Hazard):
    """Channels permuted by an index, and back by its inverse, with a sum in between."""

    reason = "the operator acts on the axis itself"

    def prepare(self) -> None:
        order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1))
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = x[..., self.order]
        y = y + self.blocks[layer].mlp(self.blocks[layer].norm2(y))
        return y.index_select(-1, self.back)


class Halves(Hazard):
    """A stream of two halves that read each other (reversible layers)."""

    reason = "cuts through the axis"

    def prepare(self) -> None:
        s = Shape(hidden=HALF)
        self.f, self.g, self.nf, self.ng = MLP(s), MLP(s), RMSNorm(HALF), RMSNorm(HALF)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(self.nf(b))
        b = b + self.g(self.ng(a))
        return torch.cat([a, b], -1)


class SplitAndJoined(Hazard):
    """The stream in three unequal pieces, put together in the old order."""

    reason = "cuts through the axis"

    def between(self, x: Tensor, layer: int) -> Tensor:
        a, b, c = x.split([4, 8, 12], -1)
        return torch.cat([torch.cat([a, b], -1), c], -1)


class SplitAndSwapped(Hazard):
    """The same in another order."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        a, b, c = x.split([4, 8, 12], -1)
        return torch.cat([c, a, b], -1)


class UnequalReaders(Hazard):
    """Two linears read one part of the normed stream each."""

    def prepare(self) -> None:
        self.a, self.b = nn.Linear(8, HIDDEN), nn.Linear(16, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        return x + self.a(h[..., :8]) + self.b(h[..., 8:])


class HalvesWritten(Hazard):
    """Two linears write one part of the stream each."""

    reason = "cuts through the axis"

    def prepare(self) -> None:
        self.a, self.b = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 16, bias=False)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        return x + torch.cat([self.a(h), self.b(h)], -1)


class DenseConcat(Hazard):
    """Every layer reads all earlier ones side by side, the raw streams (DenseNet)."""

    folds = True

    def prepare(self) -> None:
        self.two, self.three = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(3 * HIDDEN, HIDDEN)

    def forward(self, ids: Tensor) -> Any:
        a = self.embedded(ids)
        b = self.blocks[0](a) + self.two(torch.cat([a, a * 2], -1))
        return self.finish(b + self.three(torch.cat([b, a, b - a], -1)))


class NormOfBoth(Hazard):
    """A norm over stream and embedding side by side, in a block that two places share (Zamba)."""

    reason = "multiplies channel by channel"

    def prepare(self) -> None:
        self.both, self.reduce = RMSNorm(2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, ids: Tensor) -> Any:
        e = x = self.embedded(ids)
        for _ in range(2):
            y = self.reduce(self.both(torch.cat([x, e], -1)))
            x = x + self.blocks[0].mlp(self.blocks[0].norm2(y))
            x = x + self.blocks[0].attn(self.blocks[0].norm1(x))
        return self.finish(x)


class Widened(Hazard):
    """The stream is padded with zeros to another width on its way, and cut again."""

    folds = True

    def prepare(self) -> None:
        self.wide = MLP(Shape(hidden=HIDDEN + 8))
        self.nw = RMSNorm(HIDDEN + 8, weight=False)

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = torch.cat([x, torch.zeros(*x.shape[:2], 8, dtype=x.dtype)], -1)
        y = y + self.wide(self.nw(y))
        return y[..., :HIDDEN]


class OneMoreChannel(Hazard):
    """A channel of ones beside the stream stands for a bias."""

    reason = "cuts through the axis"

    def prepare(self) -> None:
        self.affine = param(HIDDEN, HIDDEN + 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        return x + torch.cat([h, torch.ones_like(h[..., :1])], -1) @ self.affine.t()


class TwoStreamsInOne(Hazard):
    """Two streams side by side in one tensor, normed apart."""

    folds = True

    def prepare(self) -> None:
        self.second = nn.Embedding(40, HIDDEN)
        self.join = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, ids: Tensor) -> Any:
        x = torch.cat([self.embed(ids), self.second(ids)], -1).unflatten(-1, (2, HIDDEN))
        b = self.blocks[0]
        x = x + b.mlp(b.norm2(x))
        y = self.join(x.flatten(-2))
        return self.finish(y + b.attn(b.norm1(y)))

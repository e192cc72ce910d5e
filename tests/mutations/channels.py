"""Operators that act on the channels of the stream, and movements that do or do not tear its vectors apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import BATCH, HIDDEN, SEQ, Shape


class ViewDtype(Hazard):
    """The bits of the stream."""

    reason = "bits as another type"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return (x.view(torch.int64) ^ 1).view(torch.float64) if layer == 0 else x


class SliceInside(Hazard):
    """Channels of the stream go their own way."""

    reason = "cuts through the axis"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + F.pad(x[..., :8], (0, HIDDEN - 8))


class Roll(Hazard):
    """Channels are rolled."""

    reason = "acts on the axis itself"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + x.roll(1, -1)


class MaxPool(Hazard):
    """A maximum over tokens."""

    reason = "aten::amax does not commute"

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.amax(1, keepdim=True)))


class EinsumPos(Hazard):
    """A scale per position where positions are as many as channels."""

    folds = True

    def prepare(self) -> None:
        self.c = param(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(torch.einsum("bsh,s->bhs", x[:, :1].expand(-1, HIDDEN, -1), self.c).transpose(1, 2)))


class BoolMask(Hazard):
    """Tokens gathered by a matrix of positions."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        i = torch.tensor([[0, 1], [1, 0]])
        return self.head(self.norm(x[:, i]))


class IndexPair(Hazard):
    """Tokens gathered by pairs."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x[torch.tensor([0, 1]), torch.tensor([2, 1])]))


class Gather(Hazard):
    """Gather."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.gather(1, torch.tensor([[[2]], [[1]]]).expand(2, 1, HIDDEN))))


class PermIndex(Hazard):
    """Channels permuted by a buffer."""

    def prepare(self) -> None:
        self.register_buffer("perm", torch.arange(HIDDEN).roll(5))

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.blocks[layer].mlp(self.norm(x)[..., self.perm])


class MutIndex(Hazard):
    """An index that the program changes."""

    def prepare(self) -> None:
        self.register_buffer("perm", torch.arange(HIDDEN))

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = x[..., self.perm]
        self.perm.copy_(self.perm.roll(1))
        return x + y


class Complex(Hazard):
    """Complex rope."""

    reason = "aten::view_as_complex does not"

    def finish(self, x: Tensor) -> Any:
        y = torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            * torch.polar(torch.ones(12, dtype=x.dtype), torch.arange(12, dtype=x.dtype))
        ).flatten(-2)
        return self.head(self.norm(y))


class Hadamarded(Hazard):
    """A rotation that is already there."""

    reason = "spinpass::hadamard does not"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.ops.spinpass.hadamard(x, 24, False)


class UnsqueezeHeads(Hazard):
    """A reader that sees the stream as heads."""

    folds = True

    def prepare(self) -> None:
        self.hw = param(4, 6, 10)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.einsum("bshd,hdo->bso", self.norm(x).unflatten(-1, (4, 6)), self.hw))


class PartHeads(Hazard):
    """A reader that contracts part of the stream."""

    reason = "part of the axis is summed over"

    def prepare(self) -> None:
        self.hw = param(4, 6, 10)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.einsum("bshd,hdo->bsho", self.norm(x).unflatten(-1, (4, 6)), self.hw))


class CastMid(Hazard):
    """A cast to and fro."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x.to(torch.float32).to(torch.float64)


class BF16Cache(Hazard):
    """A rounding cast."""

    reason = "not floating point"

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x.to(torch.int32).to(torch.float64) + x


class Conv1dHead(Hazard):
    """A convolution over channels."""

    def prepare(self) -> None:
        self.cv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.cv(x.transpose(1, 2)).transpose(1, 2)


class Bilinear(Hazard):
    """A bilinear form."""

    reason = "aten::bilinear does not"

    def prepare(self) -> None:
        self.bl = nn.Bilinear(HIDDEN, HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.bl(x, x))


class CumsumChannel(Hazard):
    """A running sum over channels."""

    reason = "acts on the axis itself"

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.cumsum(x, -1))


class GroupNormed(Hazard):
    """Groups of channels normed."""

    reason = "aten::group_norm does not"

    def prepare(self) -> None:
        self.gn = nn.GroupNorm(4, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.gn(x.flatten(0, 1)))


class Concat(Hazard):
    """Two normed streams side by side."""

    reason = "concatenated with other values"

    def prepare(self) -> None:
        self.w = nn.Linear(2 * HIDDEN, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        self.e = e
        return e

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.w(torch.cat([self.norm(x), self.norm(self.e)], -1))


class ConcatRaw(Hazard):
    """Two raw streams side by side."""

    folds = True

    def prepare(self) -> None:
        self.w = nn.Linear(2 * HIDDEN, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        self.e = e
        return e

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.w(torch.cat([x, self.e], -1))


class FlattenedNonlinearity(Hazard):
    """A nonlinearity acts on several vectors in one axis, between centred streams: batch and channels, tokens and channels."""

    shape = Shape(norm="ln")
    reason = "aten::tanh does not|several vectors on one axis"

    def between(self, x: Tensor, layer: int) -> Tensor:
        columns = torch.tanh(F.layer_norm(x, (HIDDEN,)).transpose(1, 2).reshape(-1, SEQ))
        x = x + columns.view(BATCH, HIDDEN, SEQ).transpose(1, 2)
        return x + torch.tanh(F.layer_norm(x, (HIDDEN,)).flatten(1)).view_as(x)

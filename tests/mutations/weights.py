"""Weights that are shared, transposed, stored otherwise or computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import FFN, HIDDEN, Shape


class SharedProj(Hazard):
    """One output projection for two layers, a head on the raw stream."""

    folds = True
    shape = Shape(layers=2)

    def prepare(self) -> None:
        self.blocks[1].attn.o.weight = self.blocks[0].attn.o.weight

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.head(x))


class SharedGateUp(Hazard):
    """One weight as gate and up."""

    folds = True

    def prepare(self) -> None:
        self.blocks[0].mlp.up.weight = self.blocks[0].mlp.gate.weight


class WeightChunk(Hazard):
    """A weight cut into pieces."""

    def prepare(self) -> None:
        self.w = param(2 * HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a, b = self.w.chunk(2, 0)
        return x + F.linear(self.blocks[layer].norm2(x), a + b)


class WeightExpr(Hazard):
    """Weight norm."""

    folds = True

    def prepare(self) -> None:
        self.w = param(HIDDEN, FFN)
        self.gain = param(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        w = self.gain * self.w / self.w.norm(dim=1, keepdim=True)
        return x + F.linear(F.relu(F.linear(self.blocks[layer].norm2(x), self.w.t())), w)


class LoRA(Hazard):
    """Low-rank weights, merged and not."""

    folds = True

    def prepare(self) -> None:
        self.A = param(4, HIDDEN)
        self.B = param(HIDDEN, 4)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        return x + F.linear(h, self.B @ self.A) + h @ self.A.t() @ self.B.t()


class WeightBothWays(Hazard):
    """W used as W and W.T (tied autoencoder MLP)."""

    folds = True

    def prepare(self) -> None:
        self.w = param(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + F.linear(F.relu(F.linear(self.norm(x), self.w)), self.w.t())


class SquareWeightBothWays(Hazard):
    """O weight square used on both sides."""

    folds = True

    def prepare(self) -> None:
        self.w = param(HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + F.linear(F.relu(F.linear(self.norm(x), self.w)), self.w)


class SymmetricRead(Hazard):
    """A quadratic form of the stream."""

    def prepare(self) -> None:
        self.w = param(HIDDEN, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return (self.head(h), torch.einsum("bsd,de,bte->bst", h, self.w, h), h @ self.w @ h.transpose(1, 2))


class Conv1D(Hazard):
    """GPT-2's layers: addmm on flattened tokens with (in, out) weights, and mm, and 1×1 convolutions."""

    folds = True
    shape = Shape(norm="ln", bias=True)

    def prepare(self) -> None:
        self.w1, self.b1, self.w2, self.b2 = param(HIDDEN, FFN), param(FFN), param(FFN, HIDDEN), param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x).view(-1, HIDDEN)
        y = torch.addmm(self.b2, F.gelu(torch.addmm(self.b1, h, self.w1)), self.w2)
        return x + y.view_as(x) + torch.mm(torch.tanh(torch.mm(h, self.w1)), self.w2).view_as(x)


class WeightNormed(Hazard):
    """torch's own parametrisations: weight norm and a symmetric one."""

    folds = True

    def prepare(self) -> None:
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, FFN))
        self.down = nn.utils.parametrizations.weight_norm(nn.Linear(FFN, HIDDEN), dim=1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.down(F.gelu(self.up(self.blocks[layer].norm2(x))))


class BlockDiagonal(Hazard):
    """A grouped linear layer reads and writes groups of channels."""

    def prepare(self) -> None:
        self.w, self.scatter = param(4, 6, 6), param(4, 6, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = torch.einsum("bsgi,gio->bsgo", self.norm(x).unflatten(-1, (4, 6)), self.w)
        return x + torch.einsum("bsgo,goh->bsh", F.gelu(h), self.scatter)


class AttentionOverWeights(Hazard):
    """Persistent memory: parameters are keys and values of the stream itself, read through a norm."""

    missing = "R1"

    def prepare(self) -> None:
        self.keys, self.memory = param(9, HIDDEN), param(9, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        memory = self.memory[None].expand(x.shape[0], -1, -1)
        return x + F.scaled_dot_product_attention(h, self.keys[None].expand_as(memory), memory)


class OneWeightManyWays(Hazard):
    """One parameter as gate of one MLP, transposed as its down projection, and sliced as a bias of the stream."""

    folds = True

    def prepare(self) -> None:
        self.up = nn.Linear(HIDDEN, FFN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        return x + (F.silu(self.up(h)) * F.linear(h, self.up.weight.roll(1, 0))) @ self.up.weight + self.up.weight[0]


class OddProducts(Hazard):
    """tensordot, inner, matvec, a weight on the left, an einsum with dots, a linear with a vector."""

    def prepare(self) -> None:
        self.w, self.v = param(7, HIDDEN), param(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return (
            self.head(h),
            torch.tensordot(h, self.w, dims=([2], [1])),
            torch.inner(h, self.w),
            h @ self.v,
            (self.w @ h.transpose(1, 2)).transpose(1, 2),
            torch.einsum("...d,vd->...v", h, self.w),
            F.linear(h, self.v),
            torch.mv(h[0], self.v),
            (h * self.v).sum(-1),
        )

"""An MLP whose weights are stored otherwise, or computed from other constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import FFN, HIDDEN


class Both(Hazard):
    """An MLP whose two weights are computed by :meth:`weights` from parameters and buffers."""

    def weights(self) -> tuple[Tensor, Tensor]:
        """(FFN, HIDDEN), (HIDDEN, FFN)."""
        raise NotImplementedError

    def between(self, x: Tensor, layer: int) -> Tensor:
        up, down = self.weights()
        return x + F.linear(F.gelu(F.linear(self.blocks[layer].norm2(x), up)), down)


class StoredTransposed(Both):
    """(in, out) weights, transposed where they are used."""

    folds = True

    def prepare(self) -> None:
        self.up, self.down = param(HIDDEN, FFN), param(FFN, HIDDEN)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.up.t(), self.down.transpose(0, 1)


class InBuffers(Both):
    """Weights and a norm's scale are buffers, one of them not saved; the biases are lifted constants."""

    folds = True

    def prepare(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.register_buffer("up", torch.randn(FFN, HIDDEN, generator=draw, dtype=torch.float64) / 5)
        self.register_buffer(
            "down", torch.randn(HIDDEN, FFN, generator=draw, dtype=torch.float64) / 5, persistent=False
        )
        self.constant = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def between(self, x: Tensor, layer: int) -> Tensor:
        return super().between(x, layer) + self.constant


class SumOfTwo(Both):
    """The sum, and the difference, of two parameters."""

    reason = "its uses need different scales"

    def prepare(self) -> None:
        self.a, self.b = param(FFN, HIDDEN), param(FFN, HIDDEN)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.a + self.b, (self.a - 0.5 * self.b).t()


class ProductOfTwo(Both):
    """A mask times a weight, a sign times a magnitude."""

    folds = True

    def prepare(self) -> None:
        self.a, self.b, self.size = param(FFN, HIDDEN), param(HIDDEN, FFN), param(HIDDEN, 1)
        self.register_buffer("mask", torch.rand(FFN, HIDDEN, generator=torch.Generator().manual_seed(1)) > 0.5)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.a * self.mask, torch.sign(self.b) * self.size.abs()


class MatrixProduct(Both):
    """W = A B C, and a Kronecker product."""

    folds = True

    def prepare(self) -> None:
        self.a, self.b, self.c, self.k1, self.k2 = (
            param(FFN, 5),
            param(5, 5),
            param(5, HIDDEN),
            param(4, 5),
            param(6, 8),
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.a @ self.b @ self.c, torch.kron(self.k1, self.k2)


class Concatenated(Both):
    """Weights put together of two parameters, along each of their axes."""

    folds = True

    def prepare(self) -> None:
        self.a, self.b, self.c, self.d = (
            param(FFN, 10),
            param(FFN, HIDDEN - 10),
            param(10, FFN),
            param(HIDDEN - 10, FFN),
        )

    def weights(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.a, self.b], 1), torch.cat([self.c, self.d], 0)


class OneOfAStack(Both):
    """Layers of one big parameter: selected, sliced, permuted rows, one layer used twice."""

    folds = True

    def prepare(self) -> None:
        self.stack = param(3, 2, FFN, HIDDEN)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.stack[1, 0].flip(0), self.stack[1:, 1][0].t()


class Padded(Both):
    """Weights padded with zeros, and cut."""

    folds = True

    def prepare(self) -> None:
        self.up, self.down = param(FFN - 4, HIDDEN), param(HIDDEN + 3, FFN)

    def weights(self) -> tuple[Tensor, Tensor]:
        return F.pad(self.up, (0, 0, 0, 4)), self.down[3:]


class LowerPrecision(Both):
    """Weights stored in float32 and half precision, cast where they are used, one of them rounded twice."""

    bound = 1e-6
    folds = True

    def prepare(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.register_buffer("up", torch.randn(FFN, HIDDEN, generator=draw).float() / 5)
        self.register_buffer("down", torch.randn(HIDDEN, FFN, generator=draw).float() / 5)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = self.up, self.down
        super()._apply(fn, recurse)
        self.up, self.down = kept
        return self

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.up.double(), self.down.double()

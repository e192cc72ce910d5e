"""A constant that is stored as codes:  (q − z)·s, computed when it is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinpass.graph import Rows

from .grid import Codes


@dataclass(frozen=True, eq=False)
class Coded:
    """What the codes of a matrix stand for, in the layout of a constant (:class:`spinpass.graph.ConstantSource`).

    Args:
        codes: of the constant as a matrix whose columns lie along ``dim``.
        dim: the axis that its layer contracts.
        shape: of the constant.
        dtype: of the constant.
    """

    codes: Codes
    dim: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """That of the codes."""
        return self.codes.q.device

    @property
    def by_rows(self) -> bool:
        """Where a row of the constant is one of the codes."""
        return len(self.shape) == 2 and self.dim % 2 == 1

    def read(self, rows: Rows) -> Tensor:
        """Return the values of some rows of the first axis."""
        if self.by_rows:
            return self.codes.rows(rows).dequantized().to(self.dtype)
        whole = laid_out(self.codes.dequantized(), self.dim, self.shape)
        return whole.to(self.dtype).contiguous()[rows]

    def exact(self, rows: Rows) -> Tensor:
        """Return the same in float64."""
        return self.read(rows).double()


def laid_out(matrix: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Return a matrix, whose columns lie along ``dim`` of a constant, as a view of the constant's shape."""
    left = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
    return matrix.reshape(*left, -1).movedim(-1, dim)

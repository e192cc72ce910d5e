"""What a constant is read from: a tensor that may be mapped from a file, folds of another source, a file of its own."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .folding import QueuedStep, folded, folded_float64, sliceable

Rows = slice | Tensor
EVERY_ROW = slice(None)
LARGE = 1 << 26
"""Bytes above which a constant is not read as a whole where it can be read in parts."""

_BLOCK = 1 << 24  # bytes of the rows that a product reads at once


class ConstantSource(Protocol):
    """What a handle reads: values of one shape, dtype and device."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""

    @property
    def device(self) -> torch.device:
        """Of what is read."""

    @property
    def by_rows(self) -> bool:
        """Whether some rows cost less than all of them."""

    def read(self, rows: Rows) -> Tensor:
        """Return these rows of the first axis, a slice or indices (n,), as a tensor of its own or a view of a file."""

    def exact(self, rows: Rows) -> Tensor:
        """Return the same in float64, as it was before it was rounded to the dtype; integers as they are."""


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor, which may be mapped from a file, read in another dtype."""

    tensor: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        """That of the tensor."""
        return self.tensor.device

    @property
    def by_rows(self) -> bool:
        """They do."""
        return True

    def read(self, rows: Rows) -> Tensor:
        """Return the rows in the dtype; see :class:`ConstantSource`."""
        return self.tensor[rows].to(self.dtype)

    def exact(self, rows: Rows) -> Tensor:
        """Return the rows in float64; see :class:`ConstantSource`."""
        found = self.read(rows)
        return found.double() if found.is_floating_point() else found


class _Derived:
    """What is made of another source, in its shape and dtype and on its device."""

    source: ConstantSource

    @property
    def shape(self) -> torch.Size:
        """That of the source."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the source."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """That of the source."""
        return self.source.device

    @property
    def by_rows(self) -> bool:
        """As of the source."""
        return self.source.by_rows


@dataclass(frozen=True, eq=False)
class FoldedSource(_Derived):
    """What steps make of another source, each time it is read."""

    source: ConstantSource
    steps: tuple[QueuedStep, ...]

    @property
    def by_rows(self) -> bool:
        """Where no step mixes the rows."""
        return sliceable(self.shape, self.steps) and self.source.by_rows

    def read(self, rows: Rows) -> Tensor:
        """Return the rows, folded and rounded once; see :class:`ConstantSource`."""
        if sliceable(self.shape, self.steps):
            return folded(self.source.read(rows), self.steps)
        return folded(self.source.read(EVERY_ROW), self.steps)[rows]

    def exact(self, rows: Rows) -> Tensor:
        """Return the rows, folded; see :class:`ConstantSource`."""
        if sliceable(self.shape, self.steps):
            return folded_float64(self.source.read(rows), self.steps)
        return folded_float64(self.source.read(EVERY_ROW), self.steps)[rows]


@dataclass(frozen=True, eq=False)
class Moved(_Derived):
    """Another source, read where it is and moved to a device."""

    source: ConstantSource
    target: torch.device

    @property
    def device(self) -> torch.device:
        """That which is moved to."""
        return self.target

    def read(self, rows: Rows) -> Tensor:
        """Return the rows on the device; see :class:`ConstantSource`."""
        return self.source.read(_at(rows, self.source.device)).to(self.target)

    def exact(self, rows: Rows) -> Tensor:
        """Return the rows in float64 on the device; see :class:`ConstantSource`."""
        return self.source.exact(_at(rows, self.source.device)).to(self.target)


def moved(source: ConstantSource, device: torch.device) -> ConstantSource:
    """Return a source of the same values on a device."""
    if source.device == device:
        return source
    if isinstance(source, Moved):
        return moved(source.source, device)
    return Moved(source, device)


def _at(rows: Rows, device: torch.device) -> Rows:
    return rows.to(device) if isinstance(rows, Tensor) else rows


@dataclass(eq=False)
class Spooled(_Derived):
    """Another source, computed once: what is read first is kept in a file without a name, and read from it later.

    Args:
        source: what is kept.
        folder: where the file lies. Its disk space is free again when nothing reads the source any more.
    """

    source: ConstantSource
    folder: Path
    _kept: Tensor | None = field(default=None, init=False)

    @property
    def by_rows(self) -> bool:
        """They do, once they are kept; what is exact is as the source."""
        return self.source.by_rows

    def read(self, rows: Rows) -> Tensor:
        """Return the rows, as a view of the file for a slice; see :class:`ConstantSource`."""
        if self._kept is None:
            self._kept = self._written()
        return self._kept[rows]

    def exact(self, rows: Rows) -> Tensor:
        """Return the rows in float64, computed anew; see :class:`ConstantSource`."""
        return self.source.exact(rows)

    def _written(self) -> Tensor:
        size = math.prod(self.shape)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".spool-") as file:
            kept = torch.from_file(file.name, shared=True, size=size, dtype=self.dtype).view(self.shape)
            for rows in row_blocks(self.source):
                kept[rows] = self.source.read(rows)
        return kept


@dataclass(frozen=True, eq=False)
class Wide(_Derived):
    """The float64 values of a source, as they were before they were rounded or after it."""

    source: ConstantSource
    unrounded: bool

    @property
    def dtype(self) -> torch.dtype:
        """It is float64."""
        return torch.float64

    def read(self, rows: Rows) -> Tensor:
        return self.source.exact(rows) if self.unrounded else self.source.read(rows).double()

    def exact(self, rows: Rows) -> Tensor:
        return self.read(rows)


def row_blocks(source: ConstantSource) -> list[slice]:
    """Return slices that cut the first axis into blocks; one slice where the source is small, or where each block would
    take as much as the whole."""
    if not source.shape or not source.by_rows or math.prod(source.shape) * source.dtype.itemsize <= LARGE:
        return [EVERY_ROW]
    row = math.prod(source.shape[1:]) * source.dtype.itemsize
    count = max(1, _BLOCK // max(row, 1))
    return [slice(start, start + count) for start in range(0, source.shape[0], count)]

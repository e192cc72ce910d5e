"""Initializers that are read while the file is written:  constant  ->  its axes in order, one matrix of a stack, rows.

A handle goes into the file a block of rows at a time; what is a view of a constant of the program remembers of which,
so that it can be replaced by integers that are known for that constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor
from torch.onnx._internal.exporter._core import TorchTensor

from spinpass.graph import Handle, row_blocks, values_of

_ROWS = 1024  # that are computed at once


@dataclass(frozen=True)
class Piece:
    """So many bytes of a tensor, which are computed when they are written to a file."""

    size: int
    write: Callable[[Any], None]


def pieces_of(held: ir.TensorProtocol) -> list[Piece]:
    """Return the pieces in which a tensor is written, in order."""
    if isinstance(held, (HandleTensor, RowsTensor)):
        return held.pieces()
    if isinstance(held, PartTensor):
        return [Piece(held.nbytes, held.tofile)]
    return [Piece(held.nbytes, lambda file: file.write(held.tobytes()))]


class HandleTensor(TorchTensor):
    """The tensor of an initializer whose values are a :class:`spinpass.graph.Handle`."""

    def numpy(self) -> Any:
        """Return the values as an array, read anew each time."""
        return TorchTensor(values_of(self.raw)).numpy()

    def tobytes(self) -> bytes:
        """Return the bytes of the values, read anew each time."""
        return TorchTensor(values_of(self.raw)).tobytes()

    def pieces(self) -> list[Piece]:
        """Return the blocks of rows; a transpose as a whole."""
        held = self.raw
        assert isinstance(held, Handle)
        found = []
        for rows in [slice(None)] if held.turned else row_blocks(held.source):
            size = len(range(*rows.indices(held.source.shape[0]))) * (held.nbytes // max(1, held.source.shape[0]))
            found.append(Piece(size, lambda file, rows=rows: TorchTensor(held.read(rows)).tofile(file)))  # type: ignore[misc]
        return found

    def tofile(self, file: Any) -> None:
        """Write the bytes of the values, a block of rows at a time."""
        for piece in self.pieces():
            piece.write(file)


def read_when_written(graph: ir.Graph) -> None:
    """Let initializers that hold handles be read when they are needed, in place."""
    for value in graph.initializers.values():
        held = value.const_value
        if isinstance(held, TorchTensor) and isinstance(held.raw, Handle):
            value.const_value = HandleTensor(held.raw, name=held.name)


@dataclass(frozen=True, eq=False)
class ConstantPart:
    """What an initializer is of a constant of the program.

    Args:
        constant: a tensor or handle.
        order: the axes of the constant, in the order in which they lie in the initializer.
        index: which matrix of a stack it is, along the first axis; None for all of the constant.
    """

    constant: Tensor
    order: tuple[int, ...]
    index: int | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of the constant behind each axis of the initializer."""
        return self.order if self.index is None else self.order[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the initializer."""
        return tuple(self.constant.shape[axis] for axis in self.axes)

    @property
    def transposes(self) -> bool:
        """Say whether it is the transpose of a matrix."""
        return self.index is None and self.order == (1, 0)

    def permuted(self, order: Sequence[int]) -> ConstantPart:
        """Return what a Transpose makes of it."""
        return ConstantPart(self.constant, tuple(self.order[axis] for axis in order))

    def matrices(self) -> list[ConstantPart]:
        """Return the matrices of a stack; none where its first axis is not that of the constant."""
        whole = self.index is None and self.order[:1] == (0,)
        return [ConstantPart(self.constant, self.order, i) for i in range(self.constant.shape[0])] if whole else []

    def read(self) -> Tensor:
        """Return the values."""
        if self.index is None:
            return values_of(self.constant).permute(self.order).contiguous()
        rows = slice(self.index, self.index + 1)
        held = self.constant.detach()
        found = held.read(rows) if isinstance(held, Handle) and not held.turned else values_of(held)[rows]
        return found.permute(self.order)[0].contiguous()

    def tensor(self, name: str, dtype: ir.DataType) -> PartTensor:
        """Return the tensor of the initializer, which reads the values when it is written."""
        return PartTensor(self, name, dtype)


class PartTensor(ir.LazyTensor):
    """The tensor of an initializer that is a part of a constant."""

    def __init__(self, part: ConstantPart, name: str, dtype: ir.DataType) -> None:
        super().__init__(lambda: TorchTensor(part.read(), name=name), dtype, ir.Shape(part.shape), name=name)
        self.part = part

    def tofile(self, file: Any) -> None:
        """Write the bytes: of the transpose of a large matrix a block of its rows at a time."""
        held = self.part.constant.detach()
        if isinstance(held, Handle) and held.in_parts and self.part.transposes:
            _write_transposed(held, file)
        else:
            super().tofile(file)


def _write_transposed(held: Handle, file: Any) -> None:
    """Write a matrix by its columns. Each block of rows is a part of every column, which goes to its place."""
    (length, columns), size, start = held.shape, held.dtype.itemsize, file.tell()
    for rows in row_blocks(held.source):
        block = held.read(rows)
        first, width = rows.indices(length)[0], len(block) * size
        content = memoryview(TorchTensor(block.t().contiguous()).tobytes())
        for column in range(columns):
            file.seek(start + (column * length + first) * size)
            file.write(content[column * width : (column + 1) * width])


def part_of(held: ir.TensorProtocol | None) -> ConstantPart | None:
    """Return which part of a constant of the program an initializer is; None for what was computed of constants."""
    if isinstance(held, PartTensor):
        return held.part
    if isinstance(held, TorchTensor) and isinstance(held.raw, Tensor):
        return ConstantPart(held.raw, tuple(range(held.raw.ndim)))
    return None


class RowsTensor(ir.LazyTensor):
    """The tensor of an initializer that is computed when it is written, some rows at a time.

    Args:
        read: returns rows of the first axis as an array.
        dtype: of these.
        shape: of the whole.
        name: of the initializer.
    """

    def __init__(
        self, read: Callable[[slice], np.ndarray[Any, Any]], dtype: ir.DataType, shape: Sequence[int], name: str
    ) -> None:
        super().__init__(lambda: ir.tensor(read(slice(None)), name=name), dtype, ir.Shape(shape), name=name)
        self._read = read

    def pieces(self) -> list[Piece]:
        """Return the blocks of some rows."""
        length = self.shape.numpy()[0]
        found = []
        for start in range(0, length, _ROWS):
            rows = slice(start, min(start + _ROWS, length))
            size = self.nbytes // max(1, length) * (rows.stop - start)
            found.append(Piece(size, lambda file, rows=rows: file.write(ir.tensor(self._read(rows)).tobytes())))  # type: ignore[misc]
        return found

    def tofile(self, file: Any) -> None:
        """Write the bytes, some rows at a time."""
        for piece in self.pieces():
            piece.write(file)

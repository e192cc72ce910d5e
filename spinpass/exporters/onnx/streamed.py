"""Initializers that are read while the file is written: a handle goes into it a block of rows at a time."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch.onnx._internal.exporter._core import TorchTensor

from spinpass.graph import Handle, values_of


class HandleTensor(TorchTensor):
    """The tensor of an initializer whose values are a :class:`spinpass.graph.Handle`."""

    def numpy(self) -> Any:
        """Return the values as an array, read anew each time."""
        return TorchTensor(values_of(self.raw)).numpy()

    def tobytes(self) -> bytes:
        """Return the bytes of the values, read anew each time."""
        return TorchTensor(values_of(self.raw)).tobytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes of the values, a block of rows at a time."""
        held = self.raw
        assert isinstance(held, Handle)
        for block in held.blocks():
            TorchTensor(block).tofile(file)


def read_when_written(graph: ir.Graph) -> None:
    """Let initializers that hold handles be read when they are needed, in place."""
    for value in graph.initializers.values():
        held = value.const_value
        if isinstance(held, TorchTensor) and isinstance(held.raw, Handle):
            value.const_value = HandleTensor(held.raw, name=held.name)

"""New nodes with types and shapes, inserted into a graph before a given node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"


class Builder:
    """A builder inserts nodes before ``anchor`` and constants into its graph, one constant for equal arrays."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.anchor: ir.Node | None = None
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def at(self, anchor: ir.Node) -> Builder:
        """Put further nodes before ``anchor``."""
        self.anchor = anchor
        return self

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value | None = None,
        *,
        shape: Sequence[Any] | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Return the first result of a new node; its type and shape are those of ``like`` where they are not given."""
        return self.node(op, inputs, [(like, shape, dtype)], domain=domain, attributes=attributes)[0]

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        results: Sequence[tuple[ir.Value | None, Sequence[Any] | None, ir.DataType | None]],
        *,
        domain: str = "",
        attributes: Mapping[str, Any],
    ) -> Sequence[ir.Value]:
        """Return all results of a new node; each is described by (like, shape, dtype)."""
        assert self.anchor is not None
        new = ir.node(op, list(inputs), dict(attributes), domain=domain, num_outputs=len(results))
        new.metadata_props.update(self.anchor.metadata_props)  # where in the model it is
        for value, (like, shape, dtype) in zip(new.outputs, results, strict=True):
            kind = dtype if dtype is not None else like.dtype if like is not None else None
            value.type = None if kind is None else ir.TensorType(kind)
            known = shape if shape is not None else like.shape if like is not None else None
            value.shape = None if known is None else ir.Shape(known)
        self.graph.insert_before(self.anchor, new)
        return new.outputs

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """Return a constant of the graph that holds the array."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"fused_{len(self._constants)}"
            while name in self.graph.initializers:
                name += "_"
            tensor = ir.tensor(array, name=name)
            kind = ir.TensorType(tensor.dtype)
            made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=kind)
            self.graph.register_initializer(made)
            self._constants[key] = made
        return self._constants[key]

    def integers(self, *values: int) -> ir.Value:
        """Return a constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def reshape(self, x: ir.Value, target: Sequence[int], shape: Sequence[Any]) -> ir.Value:
        """Reshape to ``target``, where 0 keeps an axis; ``shape`` is what the result then has."""
        return self.add("Reshape", [x, self.integers(*target)], x, shape=shape)

"""Integers in the place of constants:  MatMul, Gemm  ->  MatMulNBits,   Gather  ->  GatherBlockQuantized.

A transpose in front of a product is folded into the packing; a table that is read from the head's constant shares it.
A Gemm that multiplies by a constant becomes a product and a sum first:  x Wᵀ + b.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..fusion.builder import CONTRIB
from ..streamed import RowsTensor

Array = np.ndarray[Any, Any]
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_PICKS = "it picks what comes next, and rounding would change which"
_SCORING = {"Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Softplus", "Sqrt", "Add", "Sub", "Mul", "Div", "Cast", "Where"}
_SCORING |= {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice"}
_ROWS = 1024  # of scales that are looked at at once
_ELEMENTWISE = {"Identity", "Cast", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"}


@dataclass(frozen=True)
class PackedMatrix:
    """This is a quantized matrix of N columns and K rows, as the inputs of ``MatMulNBits``."""

    rows: int
    columns: int
    bits: int
    block_size: int
    inputs: tuple[ir.Value, ...]  # packed (N, blocks, bytes), scales (N, blocks), zero points


@dataclass
class Work:
    """This is one pass over the nodes of a graph, and what it counted."""

    graph: ir.Graph
    block_size: int
    symmetric: bool
    accuracy_level: int
    head_bits: int | None
    table_bits: int | None
    keep: frozenset[str]
    matmuls: int = 0
    heads: int = 0
    tables: int = 0
    shared: int = 0
    kept: list[str] = field(default_factory=list)
    why_float: str = "heads and tables are to stay"
    packed: dict[tuple[str, bool, int], PackedMatrix] = field(default_factory=dict)

    def run(self) -> None:
        """Replace what can be replaced, in place."""
        for node in [node for node in self.graph if node.op_type == "Gemm" and node.domain in ("", "ai.onnx")]:
            self._split(node)
        nodes = [node for node in self.graph if node.domain in ("", "ai.onnx")]
        for node in nodes:
            if node.op_type == "MatMul":
                self._matmul(node)
        for node in nodes:  # after the heads, to share with them
            if node.op_type == "Gather":
                self._gather(node)

    def _split(self, node: ir.Node) -> None:
        """Make MatMul and Add of a Gemm whose matrix gets integers. Others stay: one node computes faster than two."""
        a, b, *rest = node.inputs
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = not given.get("transA") and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
        if a is None or b is None or not b.is_initializer() or not plain:
            return
        by_column = bool(given.get("transB"))
        bits = self.bits_of(b, by_column, _is_head(node))
        if bits is None or self._why_keep(b, bits, rank=2):
            return
        if self.picks(node):
            self.kept.append(f"{b.name}: {_PICKS}")
            return
        turned = [ir.node("Transpose", [b], {"perm": [1, 0]})] if by_column else []
        product = ir.node("MatMul", [a, turned[0].outputs[0] if turned else b], name=node.name)
        result, bias = product.outputs[0], rest[0] if rest else None
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        made = [*turned, product] + ([] if bias is None else [ir.node("Add", [result, bias])])
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], made, node.outputs, made[-1].outputs)

    def _matmul(self, node: ir.Node) -> None:
        x, matrix = node.inputs[0], constant_matrix(node.inputs[1])
        if x is None or matrix is None:
            return
        constant, by_column = matrix
        head = _is_head(node)
        bits = self.bits_of(constant, by_column, head)
        reason = self._why_keep(constant, bits, rank=2) or (_PICKS if self.picks(node) else "")
        if reason or bits is None:
            self.kept.append(f"{constant.name}: {reason}")
            return
        packed = self._pack(constant, by_column, bits)
        attributes = {"K": packed.rows, "N": packed.columns, "bits": bits, "block_size": packed.block_size}
        level = self.level_of(x)
        if level:
            attributes["accuracy_level"] = level
        self._replace(node, "MatMulNBits", (x, *packed.inputs), attributes)
        if head:
            self.heads += 1
        else:
            self.matmuls += 1

    def picks(self, node: ir.Node) -> bool:
        """Say whether the largest values of a product are picked, as a router picks experts."""
        return _is_picked_from(node.outputs[0])

    def level_of(self, x: ir.Value) -> int:
        """Say how a product with this operand is computed."""
        return self.accuracy_level

    def bits_of(self, constant: ir.Value, by_column: bool, head: bool) -> int | None:
        """Say how many bits a matrix gets; None keeps it."""
        return self.head_bits if head else 4

    def table_bits_of(self, constant: ir.Value) -> int | None:
        """Say how many bits a table gets; None keeps it."""
        return self.table_bits

    def _gather(self, node: ir.Node) -> None:
        table, indices = node.inputs
        if table is None or not table.is_initializer() or table.dtype not in FLOATS or len(table.shape or ()) != 2:
            return
        axis = node.attributes.get("axis")
        if axis is not None and axis.as_int() != 0:
            return
        bits = self.table_bits_of(table)
        reason = self._why_keep(table, bits, rank=2)
        if not reason and self.block_size and _static(table)[1] % self.block_size:
            reason = f"its rows of {_static(table)[1]} are no multiple of the block size {self.block_size}"
        if reason or bits is None:
            self.kept.append(f"{table.name}: {reason}")
            return
        self.shared += self.key_of(table, True, bits) in self.packed
        packed = self._pack(table, True, bits)
        flat = ir.node("Reshape", [packed.inputs[0], self.constant("rows", np.array([packed.columns, -1], np.int64))])
        self.graph.insert_before(node, flat)
        attributes = {"bits": bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = (flat.outputs[0], indices, *packed.inputs[1:])
        if packed.rows % packed.block_size:
            self._cut(node, packed.rows)
        self._replace(node, "GatherBlockQuantized", inputs, attributes)
        self.tables += 1

    def _cut(self, node: ir.Node, columns: int) -> None:
        """Put a Slice behind a lookup: the kernel returns rows of whole blocks."""
        result, columns_of = node.outputs[0], {"start": 0, "end": columns, "axis": -1}
        ends = [self.constant(f"columns.{name}", np.array([n], np.int64)) for name, n in columns_of.items()]
        cut = ir.node("Slice", [None, *ends])
        cut.outputs[0].type, cut.outputs[0].shape = result.type, result.shape
        ir.convenience.replace_all_uses_with(result, cut.outputs[0], replace_graph_outputs=True)
        cut.replace_input_with(0, result)
        result.shape = None  # of rows padded to blocks
        self.graph.insert_after(node, cut)

    def _why_keep(self, constant: ir.Value, bits: int | None, rank: int) -> str:
        if constant.name in self.keep:
            return "it is named to be kept"
        if bits is None:
            return self.why_float
        if constant.dtype not in FLOATS:
            return f"its type is {constant.dtype}"
        shape = _static(constant)
        if len(shape) != rank:
            return f"its shape {list(shape)} is not that of a matrix"
        return f"its shape {list(shape)} is smaller than a block" if max(shape) < self.block_size else ""

    def _pack(self, constant: ir.Value, by_column: bool, bits: int) -> PackedMatrix:
        """Quantize a constant once, along the contracted axis: rows, or columns where it is used transposed."""
        key = self.key_of(constant, by_column, bits)
        if key not in self.packed:
            self.packed[key] = self.quantized(constant, by_column, bits)
        return self.packed[key]

    def key_of(self, constant: ir.Value, by_column: bool, bits: int) -> tuple[str, bool, int]:
        """Return what is the same for products and lookups that can read one copy of a constant's integers."""
        return str(constant.name), by_column, bits

    def quantized(self, constant: ir.Value, by_column: bool, bits: int) -> PackedMatrix:
        """Return the integers of a constant, as constants of the graph."""
        assert constant.const_value is not None
        array = constant.const_value.numpy()
        matrix = np.ascontiguousarray((array.T if by_column else array).astype(np.float32))
        data, scales, zero_points = _round_to_nearest(matrix, self.block_size, self.symmetric, bits)
        kind = ml_dtypes.bfloat16 if constant.dtype == ir.DataType.BFLOAT16 else array.dtype
        name = f"{constant.name}{'.T' if by_column else ''}.q{bits}"
        inputs = [self.constant(name, data), self.scales(f"{name}.scales", scales.shape, kind, lambda at: scales[at])]
        if not self.symmetric:
            inputs.append(self.constant(f"{name}.zero_points", zero_points))
        return PackedMatrix(matrix.shape[0], matrix.shape[1], bits, self.block_size, tuple(inputs))

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Add a constant to the graph under this name, or one like it that is free."""
        return self.lazy(ir.tensor(array, name=name))

    def lazy(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a tensor to the graph under its own name, or one like it that is free."""
        while tensor.name in self.graph.initializers:
            tensor.name = f"{tensor.name}_"
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def scales(self, name: str, shape: Sequence[int], kind: Any, read: Callable[[slice], Array]) -> ir.Value:
        """Add scales to the graph as the constant that an operator reads: of two bytes each where nothing is lost.

        float32 scales that are numbers of float16 are stored as those, with a Cast behind, which ONNX Runtime computes
        when it loads the file.

        Args:
            name: of the constant.
            shape: of the scales.
            kind: their dtype in the model.
            read: returns rows of them, in whatever dtype they are known in.
        """
        dtype = np.dtype(kind)
        if dtype != np.float32 or not _fit_half(shape[0], read):
            kept = ir.DataType.from_numpy(dtype)
            return self.lazy(RowsTensor(lambda at: read(at).astype(dtype), kept, shape, name))
        halves = RowsTensor(lambda at: read(at).astype(np.float16), ir.DataType.FLOAT16, shape, name)
        stored = self.lazy(halves)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        whole = cast.outputs[0]
        whole.name, whole.type, whole.shape = f"{stored.name}.float", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.graph.insert_before(self.graph[0], cast)
        return whole

    def _replace(self, node: ir.Node, op: str, inputs: tuple[ir.Value | None, ...], attributes: dict[str, int]) -> None:
        listed = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        new = ir.Node(CONTRIB, op, inputs, listed, name=node.name)
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], node.outputs, new.outputs)


def _fit_half(rows: int, read: Callable[[slice], Array]) -> bool:
    """Say whether values are numbers of float16, some rows at a time."""
    for start in range(0, rows, _ROWS):
        part = read(slice(start, start + _ROWS)).astype(np.float32)
        with np.errstate(over="ignore"):
            if not np.array_equal(part.astype(np.float16).astype(np.float32), part):
                return False
    return True


def _round_to_nearest(
    matrix: np.ndarray[Any, Any], block_size: int, symmetric: bool, bits: int
) -> tuple[Any, Any, Any]:
    """Pack a (K, N) matrix as ONNX Runtime does: data (N, blocks, bytes), scales (N, blocks), zero points."""
    with _root_logger_kept():  # importing the module below sets up the process's logging
        from onnxruntime.quantization import (
            matmul_nbits_quantizer as quantizer,
        )
    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=symmetric, bits=bits)
    data, scales, zero_points = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return data, scales, zero_points


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def constant_matrix(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """Return the constant behind the right operand of a MatMul, and whether it is used transposed; None without one."""
    if value is None:
        return None
    if value.is_initializer():
        return value, False
    node = value.producer()
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return None
    constant, order = node.inputs[0], node.attributes.get("perm")
    if constant is None or not constant.is_initializer() or (order is not None and list(order.as_ints()) != [1, 0]):
        return None
    return constant, True


def _is_picked_from(value: ir.Value) -> bool:
    users = list(value.consumers())
    return any(
        user.op_type == "TopK" or (user.op_type in _SCORING and _is_picked_from(user.outputs[0])) for user in users
    )


def _static(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None  # an initializer has one
    return tuple(value.shape.numpy())


def _is_head(node: ir.Node) -> bool:
    """Say whether the result, or something elementwise of it, is an output of the graph."""
    value = node.outputs[0]
    if value.is_graph_output():
        return True
    return any(user.op_type in _ELEMENTWISE and _is_elementwise_end(user) for user in value.consumers())


def _is_elementwise_end(node: ir.Node) -> bool:
    """Say whether a chain of single elementwise uses ends in an output of the graph."""
    while not node.outputs[0].is_graph_output():
        users = node.outputs[0].consumers()
        if len(users) != 1 or users[0].op_type not in _ELEMENTWISE:
            return False
        node = users[0]
    return True

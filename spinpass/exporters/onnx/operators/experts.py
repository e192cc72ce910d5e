"""Mixtures of experts in ONNX:  rows sorted by expert, times the matrix of each one's expert.

    y = grouped_mm(x, W, ends)   ->   x1, … xE = Split(x, sizes);  y = Concat(x1 W1, … xE WE)

Every token is multiplied by the experts it was sent to and by no other, and no weight is gathered: the matrices are
constants of their own, slices of the stack that the program stores. While the graph is optimised the product is an
opaque node, so that what it reads is folded into one constant. ``histc`` counts the rows of each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset18

from ..streamed import part_of
from .hadamard import DOMAIN, VERSION

_op: Any = opset18  # its stubs want to know the type of every value
_NODE = "GroupedMatMul"
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def expert_translations() -> dict[Any, Callable[..., Any]]:
    """Return by operator what emits ONNX for the ones that transformers computes experts with."""
    made: dict[Any, Callable[..., Any]] = {
        torch.ops.aten._grouped_mm.default: _grouped_product(),  # noqa: SLF001  an operator's name
        torch.ops.aten.histc.default: _histogram,
    }
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # there once transformers is imported
    return made if fallback is None else made | {fallback.default: _grouped_product()}


def _grouped_product() -> Callable[..., Any]:
    call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), _NODE, _schema())

    def product(rows: Any, matrices: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
        if bias is not None or out_dtype is not None or len(rows.shape) != 2 or len(matrices.shape) != 3:
            raise NotImplementedError(
                "a grouped product of other ranks than rows by matrices, or with a bias or a dtype"
            )
        y = call(rows, matrices, ends)
        y.dtype, y.shape = rows.dtype, ir.Shape([rows.shape[0], matrices.shape[2]])
        return y

    return product


def _histogram(x: Any, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    """⌊(x − min)·bins / (max − min)⌋ of what lies between, max itself in the last bin, counted by comparison.

    Without a range it is that of the values, and one bin has them all.
    """
    if min == max:
        if bins > 1:
            raise NotImplementedError("histc without a range")
        return _op.CastLike(_op.Reshape(_op.Size(x), _op.Constant(value_ints=[1])), x)

    def number(value: float) -> Any:
        return _op.CastLike(_op.Constant(value_float=float(value)), x)

    inside = _op.And(_op.GreaterOrEqual(x, number(min)), _op.LessOrEqual(x, number(max)))
    place = _op.Floor(_op.Div(_op.Mul(_op.Sub(x, number(min)), number(bins)), number(max - min)))
    place = _op.Where(inside, _op.Min(place, number(bins - 1)), number(-1))
    bins_of = _op.Constant(value=onnx.numpy_helper.from_array(_range(bins)))
    hits = _op.Equal(_op.Unsqueeze(_op.Cast(place, to=_INT64.value), _op.Constant(value_ints=[-1])), bins_of)
    # counted as float32, which is exact below 2**24
    counts = _op.ReduceSum(_op.Cast(hits, to=_FLOAT.value), _op.Constant(value_ints=[0]), keepdims=0)
    return _op.CastLike(counts, x)


def _range(bins: int) -> Any:
    return torch.arange(bins, device="cpu").numpy()


def lower_grouped_products(model: ir.Model) -> int:
    """Replace the opaque nodes of ``model``, in place; return how many there are."""
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == _NODE]
    made: dict[ir.Value, list[ir.Value]] = {}
    for node in nodes:
        rows, matrices, ends = node.inputs
        assert rows is not None and matrices is not None and ends is not None
        build = _Nodes(model.graph, node)
        if matrices not in made:
            made[matrices] = _slices(model.graph, matrices) or build.split(matrices)
        count = len(made[matrices])
        # how many rows each expert has: ends less the one before
        ends = build.add("Cast", ends, to=_INT64.value)
        first, but_last = build.constant([0]), build.add("Slice", ends, *map(build.constant, ([0], [count - 1])))
        sizes = build.add("Sub", ends, build.add("Concat", first, but_last, axis=0))
        groups = build.add("Split", rows, sizes, axis=0, outputs=count)
        groups = groups if count > 1 else [groups]
        parts = [build.add("MatMul", group, matrix) for group, matrix in zip(groups, made[matrices], strict=True)]
        result = build.add("Concat", *parts, axis=0)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [], node.outputs, [result])
    for value in made:
        if value.is_initializer() and not value.uses():
            del model.graph.initializers[str(value.name)]
    return len(nodes)


def _slices(graph: ir.Graph, matrices: ir.Value) -> list[ir.Value]:
    """Return the matrices of a stored stack as constants, without a copy; none where the stack is computed."""
    if matrices.const_value is None or not matrices.is_initializer():
        return []
    made, held = [], matrices.const_value
    whole = part_of(held)
    parts = [] if whole is None else whole.matrices()
    for i, matrix in enumerate(parts or held.numpy()):
        name = f"{matrices.name}.{i}"
        tensor = matrix.tensor(name, held.dtype) if parts else ir.Tensor(matrix, name=name, dtype=held.dtype)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        made.append(value)
    return made


class _Nodes:
    """Nodes put in front of another one."""

    def __init__(self, graph: ir.Graph, at: ir.Node) -> None:
        self._graph, self._at = graph, at

    def add(self, name: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> Any:
        """Add a node; return its result, or all of several."""
        node = ir.node(name, list(inputs), attributes, num_outputs=outputs)
        for value in node.outputs:
            dtype = _INT64 if name in ("Cast", "Slice", "Sub") else inputs[0].dtype
            assert dtype is not None  # torch.onnx sets it from the program's own value
            value.dtype = dtype
        self._graph.insert_before(self._at, node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, numbers: list[int]) -> ir.Value:
        """Add a constant of one axis."""
        node = ir.node("Constant", [], {"value_ints": numbers})
        node.outputs[0].dtype = _INT64
        self._graph.insert_before(self._at, node)
        return node.outputs[0]

    def split(self, matrices: ir.Value) -> list[ir.Value]:
        """Take a computed stack of matrices apart."""
        assert matrices.shape is not None
        count = matrices.shape[0]
        assert isinstance(count, int)  # as many as the program has parameters for
        parts = self.add("Split", matrices, self.constant([1] * count), axis=0, outputs=count)
        return [self.add("Squeeze", part, self.constant([0])) for part in (parts if count > 1 else [parts])]


def _schema() -> onnx.defs.OpSchema:
    parameter = onnx.defs.OpSchema.FormalParameter
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
    return onnx.defs.OpSchema(
        _NODE,
        DOMAIN,
        VERSION,
        inputs=[parameter("rows", "T"), parameter("matrices", "T"), parameter("ends", "I")],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", floats, ""), ("I", ["tensor(int32)", "tensor(int64)"], "")],
    )

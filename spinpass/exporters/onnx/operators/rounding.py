"""Roundings of computed values in ONNX.

``round_tensor`` of 8 bits is a QuantizeLinear and a DequantizeLinear, which ONNX Runtime fuses with the matrix product
behind them. ``round_tokens`` and ``round_rows`` are calls of model-local functions of standard ops: a runtime that
knows nothing of spinpass inlines them and simulates, :mod:`spinpass.exporters.onnx.integers` recognises them and puts
integer kernels in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
from onnxscript import opset18

from .hadamard import DOMAIN, VERSION, Body

op: Any = opset18  # its stubs want to know the type of every value
TOKENS, ROWS = "RoundTokens", "RoundRows"
_UINT8, _FLOAT, _DOUBLE = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.DOUBLE


def round_tokens_translation() -> Callable[..., Any]:
    """Return what emits an opaque node for ``torch.ops.spinpass.round_tokens`` in ``torch.onnx.export``."""
    call = onnxscript.values.Op(_OPSET, TOKENS, _schema(TOKENS, ("x", "clip"), ("bits", "symmetric")))

    def node(x: Any, bits: int, symmetric: bool, clip: float = 1.0) -> Any:
        return _like(x, call(x, _scalar(clip), bits=bits, symmetric=int(symmetric)))

    return node


def round_rows_translation() -> Callable[..., Any]:
    """Return what emits an opaque node for ``torch.ops.spinpass.round_rows`` in ``torch.onnx.export``."""
    call = onnxscript.values.Op(_OPSET, ROWS, _schema(ROWS, ("x", "scale", "zero", "limit"), ("bits",)))

    def node(x: Any, scale: Any, zero: Any, limit: float, bits: int) -> Any:
        return _like(x, call(x, scale, zero, _scalar(limit), bits=bits))

    return node


def translate_round_tensor(x: Any, scale: Any, zero: Any, bits: int) -> Any:
    """Emit standard ops for ``torch.ops.spinpass.round_tensor`` in ``torch.onnx.export``."""
    dtype = x.dtype
    if bits == 8 and dtype == _FLOAT:
        code = op.Cast(zero, to=_UINT8.value)
        axis = -1 if len(scale.shape) else 1  # of a scalar it says nothing
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, code, axis=axis), scale, code, axis=axis)
    compute = dtype if dtype == _DOUBLE else _FLOAT
    wide, step, middle = (op.Cast(v, to=compute.value) for v in (x, scale, zero))
    floor, top = (op.Cast(op.Constant(value_float=float(v)), to=compute.value) for v in (0, 2**bits - 1))
    codes = op.Min(op.Max(op.Add(op.Round(op.Div(wide, step)), middle), floor), top)
    return op.Cast(op.Mul(op.Sub(codes, middle), step), to=dtype.value)


def attach_roundings(model: ir.Model) -> int:
    """Give every opaque node of ``model`` its function, in place; return how many such nodes there are."""
    nodes = [n for n in model.graph.all_nodes() if is_rounding(n, TOKENS) or is_rounding(n, ROWS)]
    for node in nodes:
        dtype = node.outputs[0].dtype
        assert dtype is not None  # torch.onnx sets it from the program's own value
        build = _tokens if is_rounding(node, TOKENS) else _rows
        function = build(node, dtype, model.opset_imports[""])
        node.op_type = function.name
        model.functions.setdefault(function.identifier(), function)
    if nodes:
        model.opset_imports[DOMAIN] = VERSION
    return len(nodes)


def is_rounding(node: ir.Node | None, name: str) -> bool:
    """Say whether the node is a rounding of this kind, before or after :func:`attach_roundings`."""
    return node is not None and node.domain == DOMAIN and node.op_type.startswith(name)


def rounding_arguments(node: ir.Node) -> tuple[int, bool]:
    """Return the bits of a rounding, and whether it is symmetric."""
    symmetric = node.attributes.get("symmetric")
    return node.attributes["bits"].as_int(), symmetric is not None and bool(symmetric.as_int())


_OPSET = onnxscript.values.Opset(DOMAIN, VERSION)


def _scalar(value: float) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("value", onnx.TensorProto.DOUBLE, [], [value]))


def _like(x: Any, y: Any) -> Any:
    y.dtype, y.shape = x.dtype, x.shape
    return y


def _schema(name: str, inputs: tuple[str, ...], attributes: tuple[str, ...]) -> onnx.defs.OpSchema:
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    integer = onnx.defs.OpSchema.AttrType.INT
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[parameter(label, "T" if label == "x" else "S") for label in inputs],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", floats, ""), *([("S", floats, "")] if len(inputs) > 1 else [])],
        attributes=[attribute(label, integer, "", required=True) for label in attributes],
    )


def _tokens(node: ir.Node, dtype: ir.DataType, opset: int) -> ir.Function:
    bits, symmetric = rounding_arguments(node)
    body, compute = Body(), _compute(dtype)
    x, clip = inputs = (ir.Value(name="x"), ir.Value(name="clip"))
    share = body.cast(clip, _DOUBLE, compute)
    codes, scale, zero = codes_of(body, body.cast(x, dtype, compute), share, bits, symmetric, compute)
    centred = codes if zero is None else body.add("Sub", codes, zero)
    y = body.cast(body.add("Mul", centred, scale), compute, dtype)
    name = f"{TOKENS}_{bits}{'' if symmetric else '_asymmetric'}_{dtype.name.lower()}"
    what = f"x rounded to {bits} bits, with a range for every vector of the last axis"
    return body.function(name, inputs, y, ("bits", "symmetric"), opset, what)


def _rows(node: ir.Node, dtype: ir.DataType, opset: int) -> ir.Function:
    bits, _ = rounding_arguments(node)
    body, compute = Body(), _compute(dtype)
    x, scale, zero, limit = inputs = [ir.Value(name=n) for n in ("x", "scale", "zero", "limit")]
    wide = body.cast(x, dtype, compute)
    step, middle = (body.cast(v, _FLOAT, compute) for v in (scale, zero))
    bound = body.cast(limit, _DOUBLE, compute)
    factor = factor_of(body, wide, bound, compute)
    codes = body.add("Add", body.add("Round", body.add("Div", body.add("Div", wide, factor), step)), middle)
    codes = body.add("Min", body.add("Max", codes, _number(body, 0, compute)), _number(body, 2**bits - 1, compute))
    rounded = body.add("Mul", body.add("Mul", body.add("Sub", codes, middle), step), factor)
    name = f"{ROWS}_{bits}_{dtype.name.lower()}"
    what = f"x rounded to {bits} bits in one range, into which vectors of the last axis above the limit are scaled"
    return body.function(name, inputs, body.cast(rounded, compute, dtype), ("bits",), opset, what)


def codes_of(
    body: Body, x: ir.Value, clip: ir.Value, bits: int, symmetric: bool, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Return the codes of x as floats, with scale and zero point per vector of the last axis, (..., 1).

    The zero point is None where they are ``symmetric``.
    """
    axis = body.constant(np.array([-1], np.int64))
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    nothing = _number(body, 0, dtype)
    if symmetric:
        low, span = _number(body, -top, dtype), body.add("ReduceMax", body.add("Abs", x), axis)
    else:
        least = body.add("Min", body.add("ReduceMin", x, axis), nothing)
        low, span = nothing, body.add("Sub", body.add("Max", body.add("ReduceMax", x, axis), nothing), least)
    step = body.add("Div", body.add("Mul", span, clip), _number(body, top, dtype))
    scale = body.add("Where", body.add("Greater", step, nothing), step, _number(body, 1, dtype))
    codes, zero = body.add("Round", body.add("Div", x, scale)), None
    if not symmetric:
        zero = body.add("Round", body.add("Div", body.add("Mul", body.add("Neg", least), clip), scale))
        codes = body.add("Add", codes, zero)
    return body.add("Min", body.add("Max", codes, low), _number(body, top, dtype)), scale, zero


def factor_of(body: Body, x: ir.Value, limit: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return max(1, max|x|/limit) per vector of the last axis, (..., 1)."""
    peak = body.add("ReduceMax", body.add("Abs", x), body.constant(np.array([-1], np.int64)))
    return body.add("Max", body.add("Div", peak, limit), _number(body, 1, dtype))


def _compute(dtype: ir.DataType) -> ir.DataType:
    """Compute in float32 at least, as the operators in :mod:`spinpass.operators.rounding` do."""
    return _DOUBLE if dtype == _DOUBLE else _FLOAT


def _number(body: Body, value: float, dtype: ir.DataType) -> ir.Value:
    return body.constant(np.array(value, np.float64 if dtype == _DOUBLE else np.float32))

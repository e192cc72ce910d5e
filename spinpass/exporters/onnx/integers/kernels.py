"""Products of 8-bit activations and 8-bit weights as integer kernels of ONNX Runtime.

Per token:   x Wᵀ ≈ s_x · s_W · Σ (q_x − 128)(q_W − z_W)        MatMulInteger, the scales behind it
Per tensor:  a DequantizeLinear of either operand in front of a MatMul, which ONNX Runtime fuses
Per tensor, large tokens scaled:  the same of x/k, times k

Both operands are uint8: kernels of u8·s8 without VNNI add pairs of products in 16 bits, which saturate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from spinpass.quantization import Codes

from ..operators.hadamard import Body
from ..operators.rounding import ROWS, TOKENS, codes_of, factor_of, is_rounding, rounding_arguments

_MIDDLE = 128
_UINT8, _FLOAT, _DOUBLE = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.DOUBLE
_Weight = tuple[ir.Value, ir.Value, ir.Value]


def is_rounded_per_token(x: ir.Value) -> bool:
    """Say whether the value is what symmetric int8 codes per token stand for."""
    node = x.producer()
    return node is not None and is_rounding(node, TOKENS) and rounding_arguments(node) == (8, True)


def is_static(x: ir.Value) -> bool:
    """Say whether the value is what uint8 codes with one scale stand for, large tokens scaled perhaps."""
    node = x.producer()
    if node is None or not (
        node.op_type == "DequantizeLinear" or (is_rounding(node, ROWS) and rounding_arguments(node)[0] == 8)
    ):
        return False
    scale = node.inputs[1]
    # a range for every channel cannot be taken out of the sum over channels
    return scale is not None and scale.shape is not None and scale.shape.rank() == 0


def has_integer_kernel(x: ir.Value, codes: Codes) -> bool:
    """Say whether both sides have 8 bits, the weight one scale per output, and the result is float32."""
    fits = codes.bits == 8 and codes.scales.shape[1] == 1 and x.dtype == _FLOAT
    return fits and (is_rounded_per_token(x) or is_static(x))


def arrays(codes: Codes) -> dict[str, np.ndarray[Any, Any]]:
    """Return codes (in, out) uint8, scales (out,) float32 and zero points (out,) uint8 by the suffix of their names."""
    found = {"q8": codes.q.T, "q8.scales": codes.scales[:, 0].float(), "q8.zero_points": codes.zeros[:, 0]}
    return {suffix: np.ascontiguousarray(tensor.numpy()) for suffix, tensor in found.items()}


class IntegerProducts:
    """This builds products; the codes of an activation are computed once for all that read it."""

    def __init__(self) -> None:
        self._codes: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def build(self, body: Body, x: ir.Value, weight: _Weight) -> ir.Value:
        """Multiply ``x`` by ``weight``: codes, scales and zero points as constants of the graph, see :func:`arrays`."""
        if is_rounded_per_token(x):
            return self._per_token(body, x, weight)
        node = x.producer()
        if node is None or node.op_type == "DequantizeLinear":
            return _static(body, x, weight)
        rounded, factor = self._once(x, body, _scaled_rows)
        return body.add("Mul", _static(body, rounded, weight), factor)

    def _per_token(self, body: Body, x: ir.Value, weight: _Weight) -> ir.Value:
        codes, scales, zeros = weight
        rounded, scale = self._once(x, body, _codes_per_token)
        total = body.add("MatMulInteger", rounded, codes, body.constant(np.array(_MIDDLE, np.uint8)), zeros)
        # one after the other: ONNX Runtime would fuse a product of the two scales and then ask for a scalar
        by_column = body.add("Mul", body.add("Cast", total, to=_FLOAT.value), scales)
        return body.add("Mul", by_column, scale)

    def _once(self, x: ir.Value, body: Body, build: _Builder) -> tuple[ir.Value, ir.Value]:
        if x not in self._codes:
            node = x.producer()
            assert node is not None
            self._codes[x] = build(body, node)
        return self._codes[x]


_Builder = Callable[[Body, ir.Node], tuple[ir.Value, ir.Value]]


def _static(body: Body, x: ir.Value, weight: _Weight) -> ir.Value:
    return body.add("MatMul", x, body.add("DequantizeLinear", *weight, axis=1))


def _codes_per_token(body: Body, rounding: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return uint8 codes around 128, and their scales (..., 1)."""
    x, clip = _given(rounding)
    codes, scale, _ = codes_of(body, x, body.cast(clip, _DOUBLE, _FLOAT), 8, True, _FLOAT)
    shifted = body.add("Add", codes, body.constant(np.array(_MIDDLE, np.float32)))
    return body.add("Cast", shifted, to=_UINT8.value), scale


def _scaled_rows(body: Body, rounding: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the rounded x/k, and k (..., 1)."""
    x, scale, zero, limit = _given(rounding)
    factor = factor_of(body, x, body.cast(limit, _DOUBLE, _FLOAT), _FLOAT)
    point = body.add("Cast", zero, to=_UINT8.value)
    codes = body.add("QuantizeLinear", body.add("Div", x, factor), scale, point)
    return body.add("DequantizeLinear", codes, scale, point), factor


def _given(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]

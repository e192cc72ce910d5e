"""Packed linear layers in ONNX:  ``spinpass::packed_linear``  ->  ``com.microsoft::MatMulNBits`` (and an Add).

    y = packed_linear(x, qweight, scales, qzeros, g_idx, b)   ->   y = MatMulNBits(x[…, π], B, s, z) + b

While the graph is optimised the layer is an opaque node; afterwards its constants are packed anew, as the kernel wants
them: the same integers per output, one scale per block. Three bits are stored as four, whose grid holds them. Groups of
any columns become contiguous by a permutation π of the inputs, a Gather. The values (q − z)·s stay, bit for bit, where
the model computes in the scales' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset18 as op
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.operators import unpack_words
from spinpass.quantization import Codes

from ..blocks import STORED_BITS, block_size, blocks, packed_bits
from ..fusion.builder import CONTRIB
from .hadamard import DOMAIN, VERSION

PACKED_LINEAR_NODE = "PackedLinear"


def packed_linear_translation() -> Callable[..., Any]:
    """Return what emits an opaque node and an Add for ``torch.ops.spinpass.packed_linear`` in ``torch.onnx.export``."""
    call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), PACKED_LINEAR_NODE, _schema())

    def packed_linear(x: Any, qweight: Any, scales: Any, qzeros: Any, g_idx: Any, bias: Any, bits: int) -> Any:
        order = () if g_idx is None else (g_idx,)
        y = call(x, qweight, scales, qzeros, *order, bits=bits)
        y.dtype, y.shape = x.dtype, ir.Shape([*x.shape[:-1], scales.shape[1]])
        return y if bias is None else op.Add(y, bias)

    return packed_linear


def lower_packed_linears(model: ir.Model) -> int:
    """Replace the opaque nodes of ``model`` and their constants, in place; return how many such nodes there are.

    Raises ExportError: MatMulNBits cannot take the groups of a layer.
    """
    made: dict[tuple[str, ...], _Operands] = {}
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == PACKED_LINEAR_NODE]
    replaced: set[ir.Value] = set()
    for node in nodes:
        x, *constants = node.inputs
        assert x is not None and x.dtype is not None
        replaced.update(c for c in constants if c is not None)
        key = (*(str(c.name) for c in constants if c is not None), x.dtype.name)
        if key not in made:
            made[key] = _Operands(model.graph, _codes(node), str(constants[0].name), x.dtype)  # type: ignore[union-attr]
        made[key].replace(node)
    for value in replaced:
        if not value.uses():
            del model.graph.initializers[str(value.name)]
    if nodes:
        model.opset_imports[CONTRIB] = 1
    return len(nodes)


class _Operands:
    """These are the constants of a layer, as the runtime takes them."""

    def __init__(self, graph: ir.Graph, codes: Codes, name: str, dtype: ir.DataType) -> None:
        self.graph = graph
        name = name.removesuffix(".qweight")
        self.order: ir.Value | None = None
        if codes.group_length is None:
            order, codes = _sorted(codes, name)
            self.order = self._constant(f"{name}.order", order.numpy())
        self.codes = replace(codes, bits=STORED_BITS[codes.bits])
        try:
            self.block = block_size(self.codes, name)
        except ConfigError as error:
            raise ExportError(f"{error}; unpack the program and export its float weights") from error
        q, scales, zeros = blocks(self.codes, self.block)
        bits, rows = self.codes.bits, len(q)
        kind = ml_dtypes.bfloat16 if dtype == ir.DataType.BFLOAT16 else dtype.numpy()
        self.inputs = [
            self._constant(f"{name}.q{bits}", packed_bits(q, bits).reshape(rows, q.shape[1] // self.block, -1)),
            self._constant(f"{name}.q{bits}.scales", scales.float().numpy().astype(kind)),
        ]
        if not bool((zeros == 2 ** (bits - 1)).all()):
            self.inputs.append(self._constant(f"{name}.q{bits}.zero_points", packed_bits(zeros, bits)))

    def replace(self, node: ir.Node) -> None:
        """Put MatMulNBits in the place of the opaque node."""
        x = node.inputs[0]
        if self.order is not None:
            gather = ir.node("Gather", [x, self.order], {"axis": -1})
            self.graph.insert_before(node, gather)
            x = gather.outputs[0]
        rows, columns = self.codes.q.shape
        sizes = {"K": columns, "N": rows, "bits": self.codes.bits, "block_size": self.block}
        listed = [ir.AttrInt64(key, value) for key, value in sizes.items()]
        new = ir.Node(CONTRIB, "MatMulNBits", [x, *self.inputs], listed, name=node.name)
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [new], node.outputs, new.outputs)

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value


def _codes(node: ir.Node) -> Codes:
    """Return what the constants of an opaque node hold, scales in float32."""
    bits = node.attributes["bits"].as_int()
    qweight, scales, qzeros, *rest = (_array(value) for value in node.inputs[1:])
    assert node.inputs[0] is not None and node.inputs[0].shape is not None
    columns = node.inputs[0].shape[-1]
    assert isinstance(columns, int)  # the program's own value says so
    q = unpack_words(qweight.int(), bits, 0, columns).T
    zeros = unpack_words(qzeros.int(), bits, 1, scales.shape[1]).T
    made = Codes(q, scales.float().T, zeros, bits, False)
    return replace(made, index=rest[0].long()) if rest else made


def _array(value: ir.Value | None) -> Tensor:
    assert value is not None and value.const_value is not None  # an initializer
    array = value.const_value.numpy()
    return torch.from_numpy(np.array(array.astype(np.float32) if array.dtype.kind not in "iu" else array))


def _sorted(codes: Codes, name: str) -> tuple[Tensor, Codes]:
    """Return the columns by group, int64 (in,), and the codes in that order."""
    index = codes.group_of
    order = index.argsort(stable=True)
    ordered = replace(codes, q=codes.q[:, order], index=None)
    if not torch.equal(index[order], ordered.group_of):
        sizes = sorted(set(index.bincount(minlength=codes.scales.shape[1]).tolist()))
        raise ExportError(
            f"the groups of {name} have {', '.join(map(str, sizes))} weights, and MatMulNBits takes equal ones; "
            "unpack the program and export its float weights"
        )
    return order, ordered


def _schema() -> onnx.defs.OpSchema:
    formal, option = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
    return onnx.defs.OpSchema(
        PACKED_LINEAR_NODE,
        DOMAIN,
        VERSION,
        inputs=[
            formal("x", "T"),
            formal("qweight", "tensor(int32)"),
            formal("scales", "S"),
            formal("qzeros", "tensor(int32)"),
            formal("g_idx", "tensor(int32)", param_option=option.Optional),
        ],
        outputs=[formal("y", "T")],
        type_constraints=[("T", floats, ""), ("S", floats, "")],
        attributes=[onnx.defs.OpSchema.Attribute("bits", onnx.defs.OpSchema.AttrType.INT, "", required=True)],
    )

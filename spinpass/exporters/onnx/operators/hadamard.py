"""The online Hadamard in ONNX: one call of a model-local function per op, whose body is a few standard ops.

A runtime that knows nothing of spinpass inlines the function and runs Reshape and MatMul; a tool that knows recognises
the domain ``spinpass``, the function's name and the node's attributes ``order`` and ``transpose``. While the graph is
optimised the call is an opaque node without a body, so that nothing can look inside, inline it or fold it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch

from spinpass.rotations import hadamard

DOMAIN = "spinpass"
VERSION = 1
HADAMARD_NODE = "Hadamard"

_COMPUTE = {ir.DataType.DOUBLE: (ir.DataType.DOUBLE, np.float64)}
_DEFAULT_COMPUTE = (ir.DataType.FLOAT, np.float32)


def hadamard_translation() -> Callable[..., Any]:
    """Return what emits an opaque node for ``torch.ops.spinpass.hadamard`` in ``torch.onnx.export``."""
    call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), HADAMARD_NODE, _schema())

    def hadamard_node(x: Any, order: int, transpose: bool = False) -> Any:
        y = call(x, order=order, transpose=int(transpose))
        y.dtype, y.shape = x.dtype, x.shape
        return y

    return hadamard_node


def attach_hadamards(model: ir.Model) -> int:
    """Give every opaque node of ``model`` its function, in place; return how many such nodes there are.

    The function is called ``Hadamard_<order>[x<blocks>][_transposed]_rank<rank>_<dtype>``, ``blocks`` being how many
    blocks of ``order`` lie side by side on the last axis, ``N`` where its size is an expression of dynamic sizes.
    """
    opset = model.opset_imports[""]
    nodes = list(hadamard_calls(model))
    for node in nodes:
        y = node.outputs[0]
        assert y.shape is not None and y.dtype is not None  # torch.onnx sets both from the program's own values
        order, transpose = node.attributes["order"].as_int(), bool(node.attributes["transpose"].as_int())
        size, rank, dtype = y.shape[-1], len(y.shape), y.dtype
        blocks = size // order if isinstance(size, int) else None
        name = hadamard_name(order, blocks, rank, dtype, transpose=transpose)
        node.op_type = name
        if (DOMAIN, name, "") not in model.functions:
            function = _function(name, order, blocks, rank, dtype, transpose, opset)
            model.functions[function.identifier()] = function
    if nodes:
        model.opset_imports[DOMAIN] = VERSION
    return len(nodes)


def hadamard_calls(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the online Hadamards of a model, before or after :func:`attach_hadamards`."""
    return filter(is_hadamard, model.graph.all_nodes())


def is_hadamard(node: ir.Node) -> bool:
    """Say whether the node is an online Hadamard."""
    return node.domain == DOMAIN and node.op_type.startswith(HADAMARD_NODE)


def hadamard_name(order: int, blocks: int | None, rank: int, dtype: ir.DataType, *, transpose: bool) -> str:
    """Return the name of the function, see :func:`attach_hadamards`."""
    size = f"{order}" if blocks == 1 else f"{order}x{blocks or 'N'}"
    return f"{HADAMARD_NODE}_{size}{'_transposed' if transpose else ''}_rank{rank}_{dtype.name.lower()}"


def _schema() -> onnx.defs.OpSchema:
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
    integer = onnx.defs.OpSchema.AttrType.INT
    return onnx.defs.OpSchema(
        HADAMARD_NODE,
        DOMAIN,
        VERSION,
        inputs=[onnx.defs.OpSchema.FormalParameter("x", "T")],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", floats, "")],
        attributes=[
            onnx.defs.OpSchema.Attribute("order", integer, "", required=True),
            onnx.defs.OpSchema.Attribute("transpose", integer, "", required=True),
        ],
    )


def _function(
    name: str, order: int, blocks: int | None, rank: int, dtype: ir.DataType, transpose: bool, opset: int
) -> ir.Function:
    """y = x (I ⊗ H) / √order,  H = F1 ⊗ F2 ⊗ ...

    The last axis is viewed as (blocks, f1, f2, ...) and each of the axes is multiplied by its factor, the last one from
    the right, the others (transposed) from the left.

    Reshape copies the leading axes (size 0), so no Shape op is needed. Half types are computed in float32 as in
    :func:`spinpass.rotations.hadamard.hadamard_transform`.
    """
    body = Body()
    x = ir.Value(name="x")
    compute, array_type = _COMPUTE.get(dtype, _DEFAULT_COMPUTE)
    value = body.cast(x, dtype, compute)
    leading = [0] * (rank - 1)
    whole = view = [*leading, -1 if blocks is None else blocks * order]
    trailing = 1
    for factor in reversed(hadamard.factor_matrices(order, torch.float64)):
        f = factor.shape[0]
        lead = [-1] if blocks is None else _above_one(blocks * order // (trailing * f))
        view, before = [*leading, *lead, f, *_above_one(trailing)], view
        value = value if view == before else body.reshape(value, view)
        right = (factor.t() if transpose else factor).numpy() / math.sqrt(f)
        operand = body.constant((right if trailing == 1 else right.T).astype(array_type, order="C"))
        value = body.add("MatMul", value, operand) if trailing == 1 else body.add("MatMul", operand, value)
        trailing *= f
    value = value if view == whole else body.reshape(value, whole)
    count = blocks or "any number of"
    what = f"x (I ⊗ {'Hᵀ' if transpose else 'H'})/√{order}, H the Hadamard matrix of order {order}, {count} blocks"
    return body.function(name, (x,), body.cast(value, compute, dtype), ("order", "transpose"), opset, what)


def _above_one(size: int) -> list[int]:
    return [size] if size > 1 else []


class Body:
    """A body collects the nodes of a function."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Add a node; return its result."""
        node = ir.node(op, list(inputs), attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """Add a constant of the array's type and shape."""
        node = ir.node("Constant", [], {"value": ir.tensor(array)})
        self.nodes.append(node)
        return node.outputs[0]

    def reshape(self, value: ir.Value, shape: list[int]) -> ir.Value:
        """Add a Reshape, for which a size 0 keeps the axis."""
        return self.add("Reshape", value, self.constant(np.array(shape, np.int64)))

    def cast(self, value: ir.Value, given: ir.DataType, wanted: ir.DataType) -> ir.Value:
        """Add a Cast where the types differ."""
        return value if given == wanted else self.add("Cast", value, to=wanted.value)

    def function(
        self, name: str, inputs: Sequence[ir.Value], y: ir.Value, attributes: Sequence[str], opset: int, what: str
    ) -> ir.Function:
        """Make the nodes a function of spinpass's domain; ``attributes`` are integers that a call of it states, and
        ``what`` is its doc string."""
        y.name = "y"
        graph = ir.Graph(list(inputs), [y], nodes=self.nodes, opset_imports={"": opset}, name=name)
        listed = [ir.Attr(key, ir.AttributeType.INT, None) for key in attributes]
        function = ir.Function(DOMAIN, name, "", graph=graph, attributes=listed)
        function.doc_string = what
        return function

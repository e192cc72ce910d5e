"""RMS norms:  x/√(mean x² + ε) · w  ->  SimplifiedLayerNormalization;  of a sum: SkipSimplifiedLayerNormalization.

    w · (x · Reciprocal(Sqrt(ReduceMean(Pow(x, 2), -1) + ε)))   ->   SimplifiedLayerNormalization(x, w)
    SimplifiedLayerNormalization(a + b, w)                       ->   SkipSimplifiedLayerNormalization(a, b, w), a + b

A norm without a scale (the pass folds scales into the layers behind) gets ones; one with several, such as those in
front of a Hadamard, their product. The sum stays a result of the fused node, because the residual stream goes on from
it. Norms in half precision compute between casts and stay as they are.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Builder
from .match import constant, integer, made_by, names, number, sizes, static, with_number

NORM, SKIP = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


def fuse_norms(graph: ir.Graph, builder: Builder) -> int:
    """Replace the norms of ``graph`` in place; return how many there were."""
    count = 0
    for node in list(graph):
        matched = _normalized(node)
        if matched is None:
            continue
        x, epsilon = matched
        result, scales = _scaled(node.outputs[0])
        size = static(x, -1)
        assert size is not None  # by _normalized
        made = builder.at(node)
        arrays = [array for array in map(constant, scales) if array is not None]
        one = scales[0] if len(scales) == 1 else None
        weight = one if one is not None else made.constant(math.prod(arrays, start=np.ones(size, np.float32)))
        y = made.add(NORM, [x, weight], x, axis=-1, epsilon=epsilon, stash_type=1)
        ir.convenience.replace_all_uses_with(result, y, replace_graph_outputs=True)
        count += 1
    return count


def fuse_skips(graph: ir.Graph, builder: Builder) -> int:
    """Take the sums in front of fused norms into them, in place; return how many there were."""
    count = 0
    for node in [n for n in graph if n.op_type == NORM]:
        x, scale = node.inputs
        add = made_by(x, "Add")
        if add is None or x is None or x.is_graph_output() or len(sizes(x)) != 3:
            continue
        a, b = add.inputs
        if a is None or b is None or not _same(a, x) or not _same(b, x):
            continue
        made = builder.at(add)
        epsilon = node.attributes["epsilon"].as_float()
        nothing = (None, None, x.dtype)
        y, _, _, total = made.node(
            SKIP,
            [a, b, scale],
            [(x, None, None), nothing, nothing, (x, None, None)],
            domain=CONTRIB,
            attributes={"epsilon": epsilon},
        )
        if (skip := y.producer()) is not None:
            skip.metadata_props.update(node.metadata_props)  # the sum is only taken into the norm
        ir.convenience.replace_all_uses_with([node.outputs[0], x], [y, total], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        graph.remove(add, safe=True)
        count += 1
    return count


def _normalized(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return (x, ε) where ``node`` multiplies or divides x by its root mean square along the last axis, in float32."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    pairs = [tuple(node.inputs)] if node.op_type == "Div" else [tuple(node.inputs), tuple(reversed(node.inputs))]
    for x, other in pairs:
        root = other
        if node.op_type == "Mul":
            inverse = made_by(other, "Reciprocal")
            root = None if inverse is None else inverse.inputs[0]
        sqrt = made_by(root, "Sqrt")
        add = made_by(None if sqrt is None else sqrt.inputs[0], "Add")
        found = None if add is None else with_number(add)
        if found is None or x is None or x.dtype != ir.DataType.FLOAT or static(x, -1) is None:
            continue
        mean, epsilon = found
        if _is_mean_square(mean, x):
            return x, epsilon
    return None


def _is_mean_square(mean: ir.Value, x: ir.Value) -> bool:
    node = made_by(mean, "ReduceMean")
    if node is None or integer(node, "keepdims", 1) != 1 or len(node.inputs) != 2:
        return False
    axes = constant(node.inputs[1])
    if axes is None or axes.tolist() not in ([-1], [len(sizes(x)) - 1]):
        return False
    power = made_by(node.inputs[0], "Pow")
    if power is not None:
        return power.inputs[0] is x and number(power.inputs[1]) == 2
    square = made_by(node.inputs[0], "Mul")
    return square is not None and square.inputs[0] is x and square.inputs[1] is x


def _scaled(value: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
    """Return the product of the normalized value with constant vectors, if that is all that becomes of it, and them."""
    scales: list[ir.Value] = []
    while True:
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type != "Mul" or users[0].domain != "" or value.is_graph_output():
            return value, scales
        scale = next((v for v in users[0].inputs if v is not None and v is not value), None)
        array = constant(scale)
        if scale is None or array is None or array.shape != (static(value, -1),) or scale.dtype != value.dtype:
            return value, scales
        value = users[0].outputs[0]
        scales.append(scale)


def _same(a: ir.Value, b: ir.Value) -> bool:
    """Say whether both are of one type and shape, every size known or of the same name: nothing is broadcast."""
    return a.dtype == b.dtype and None not in (named := names(sizes(a))) and named == names(sizes(b))

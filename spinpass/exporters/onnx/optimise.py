"""What torch emits, simplified: constants folded, sizes settled, general rules applied, what is equal shared.

The rules are those that can apply to what torch emits. The resulting graph is that of onnxscript's whole optimizer,
which tries every pattern on every node.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

from spinpass.graph import storage_key

from .naming import name_transposed, transposed_weights
from .streamed import part_of

_RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.flatten_to_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
)
"""The general rules of onnxscript less those for convolutions and clips, and less SlicesSplit, which compares every
pair of nodes: half of the whole export's time, for one Split instead of two Slices."""

_ROUNDS = 2  # folding opens matches for the rules and the other way round; a third round finds nothing


def optimise(model: ir.Model) -> None:
    """Fold constants, simplify and deduplicate, in place.

    A weight's transpose is folded where nothing else reads the weight, whatever its size; a tied table, shared first,
    stays one. It is computed when it is read, so that no weight stands twice in memory.
    """
    common.InlinePass()(model)
    _settle_sizes(model.graph)
    _share_initializers(model.graph)
    transposed = transposed_weights(model.graph)
    _fold_transposes(model.graph)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _RULES)
    _drop_reshapes(model.graph)
    finish: Sequence[Any] = (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
    )
    for simplify in finish:
        simplify(model)
    name_transposed(model.graph, transposed)


def _fold_transposes(graph: ir.Graph) -> None:
    """Transpose(weight) -> a constant that is computed whenever it is read."""
    for node in [n for n in graph if n.op_type == "Transpose" and n.domain == ""]:
        weight, result = node.inputs[0], node.outputs[0]
        held = None if weight is None or not weight.is_initializer() else weight.const_value
        if weight is None or held is None or len(weight.uses()) != 1 or weight.is_graph_output():
            continue
        if result.is_graph_output():
            continue
        given = node.attributes.get("perm")
        order = list(reversed(range(len(held.shape)))) if given is None else list(given.as_ints())
        shape = ir.Shape([held.shape.numpy()[axis] for axis in order])
        name, part = str(result.name), part_of(held)
        if part is None:
            turned = ir.LazyTensor(partial(_turned, held, order, name), dtype=held.dtype, shape=shape, name=name)
        else:
            turned = part.permuted(order).tensor(name, held.dtype)
        made = ir.Value(name=name, const_value=turned, shape=shape, type=ir.TensorType(held.dtype))
        ir.convenience.replace_all_uses_with(result, made)
        graph.remove(node, safe=True)
        del graph.initializers[str(weight.name)]
        graph.register_initializer(made)


def _turned(held: ir.TensorProtocol, order: Sequence[int], name: str) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(held.numpy().transpose(order)), name=name)


def _settle_sizes(graph: ir.Graph) -> None:
    """Write a size that export has found to be a number as one: torch makes a name of it, ``"2"``, in caches."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is None:
            continue
        sizes = [size if isinstance(size, int) else size.value for size in value.shape]
        value.shape = ir.Shape([int(s) if isinstance(s, str) and s.isdigit() else s for s in sizes])


def _drop_reshapes(graph: ir.Graph) -> None:
    """Reshape(x) -> x where both have the same shape, symbols included, which a fresh export often has."""
    for node in list(graph):
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Reshape" or x is None or x.shape is None or x.shape != y.shape or y.is_graph_output():
            continue
        if all(isinstance(size, int) or size.value is not None for size in x.shape):
            ir.convenience.replace_all_uses_with(y, x)
            graph.remove(node, safe=True)


def _share_initializers(graph: ir.Graph) -> None:
    """Keep one initializer for every tensor in memory: constants tied in the program stay one in the file."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        raw = value.const_value.raw if isinstance(value.const_value, ir.Tensor) else None
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0:
            continue
        kept = first.setdefault(storage_key(raw), value)
        if kept is not value and not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[str(value.name)]

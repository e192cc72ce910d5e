"""What an operator is composed of, where torch says so: as a small graph, traced for one call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from .editor import ProgramEditor
from .nodes import is_composed, is_op, shape, value

_PLACE = ("nn_module_stack", "torch_fn", "source_fn_stack", "stack_trace", "custom")


def decomposed(editor: ProgramEditor, node: Node) -> GraphModule | None:
    """Return a graph over the operands of ``node``, in the order of ``node.all_input_nodes``, that gives its result.

    Return None where torch knows no decomposition of the operator, or cannot trace that of this call.
    """
    compute = _composition(node) if is_op(node) else None
    if compute is None or not isinstance(value(node), Tensor):
        return None
    operands = node.all_input_nodes

    def call(*given: Any) -> Any:
        instead = dict(zip(operands, given))
        return compute(*map_arg(node.args, instead.__getitem__), **map_arg(node.kwargs, instead.__getitem__))

    try:
        with editor.fake_mode(), torch.no_grad():
            made = make_fx(call)(*map(value, operands))
    except Exception:  # whatever a decomposition cannot do with fake tensors; the operator stays as it is
        return None
    returned = made.graph.find_nodes(op="output")[0].args[0]
    same = isinstance(returned, Node) and returned.op == "call_function" and shape(returned) == shape(node)
    return made if same and value(returned).dtype == value(node).dtype else None


def splice(editor: ProgramEditor, node: Node, parts: GraphModule) -> None:
    """Put the nodes of ``parts``, as :func:`decomposed` returned it, in place of ``node``; the last takes its name."""
    places = parts.graph.find_nodes(op="placeholder")
    copied = dict(zip(places, node.all_input_nodes))
    with editor.graph.inserting_before(node):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                copied[part] = editor.graph.node_copy(part, copied.__getitem__)
                copied[part].meta = {"val": value(part), **{k: node.meta[k] for k in _PLACE if k in node.meta}}
    result = copied[parts.graph.find_nodes(op="output")[0].args[0]]
    editor.replace(node, result)
    editor.erase([node])
    result.name = node.name


def _composition(node: Node) -> Any:
    """Return what computes an operator out of others; None where torch has nothing of the kind."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target.decompose if is_composed(node) else _core_table().get(node.target)


@cache
def _core_table() -> dict[Any, Any]:
    return torch._decomp.core_aten_decompositions()

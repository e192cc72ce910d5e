"""The residual stream: sums of a running value and a linear layer's result."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from spinpass.graph import ProgramEditor, is_float, is_op, op_name, reachable, shape

from ..ops.rules import Centring, Concatenate, Multilinear, Normalization
from ..ops.table import rule_of
from .linear import as_linear, root_of


def find_residual_sums(editor: ProgramEditor) -> Iterator[Node]:
    """Yield every ``x ± f(x)`` with a summand that a linear layer writes, in the order of the graph."""
    for node in editor.nodes:
        if (
            not is_op(node)
            or op_name(node) not in _SUMS
            or not is_float(node)
            or not isinstance(shape(node)[-1:], tuple)
        ):
            continue
        rule = rule_of(node)
        if not isinstance(rule, Multilinear) or len(rule.terms) != 2 or len(shape(node)) < 2:
            continue
        operands = [term[0].node for term in rule.terms if len(term) == 1]
        if len(operands) != 2 or any(editor.is_constant(o) or shape(o) != shape(node) for o in operands):
            continue
        if isinstance(shape(node)[-1], int) and any(_is_written(editor, o) for o in operands):
            yield node


def _is_written(editor: ProgramEditor, node: Node) -> bool:
    """Return whether the value is a linear layer's result, or results of several (experts) put together.

    Scales, norms and biases on the way are looked through.
    """

    def parts(root: Node) -> list[Node]:
        rule = rule_of(root) if root.op == "call_function" else None
        if isinstance(rule, (Normalization, Centring)):
            return [root_of(rule.source)]
        if isinstance(rule, Concatenate):
            return [root_of(rule.sources[0])]
        if not isinstance(rule, Multilinear) or op_name(root) not in _PUT_TOGETHER:
            return []
        operands = [o.node for term in rule.terms for o in term]
        return [root_of(o) for o in operands if not editor.is_constant(o)]

    reached = reachable(root_of(node), parts, _STEPS)
    return any(n.op == "call_function" and as_linear(editor, n) is not None for n in reached)


_SUMS = {"aten::add", "aten::sub"}
_STEPS = 11  # from a sum to the linear layers that it is made of
_PUT_TOGETHER = {
    f"aten::{n}"
    for n in (
        "mul",
        "add",
        "sub",
        "neg",
        "div",
        "where",
        "sum",
        "index",
        "index_add",
        "index_put",
        "scatter_add",
        "masked_fill",
    )
}

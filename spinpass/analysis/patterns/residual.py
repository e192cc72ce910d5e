"""The residual stream: sums of a running value and a linear layer's result."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from spinpass.graph import ProgramEditor, is_float, is_op, op_name, shape

from ..ops.rules import Centring, Concatenate, Multilinear, Normalization
from ..ops.table import rule_of
from .linear import as_linear, root_of


def find_residual_sums(editor: ProgramEditor) -> Iterator[Node]:
    """Yield every ``x + f(x)`` with a summand that a linear layer writes, in the order of the graph."""
    for node in editor.nodes:
        if (
            not is_op(node)
            or op_name(node) != "aten::add"
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


def _is_written(editor: ProgramEditor, node: Node, depth: int = 12) -> bool:
    """Return whether the value is a linear layer's result, or results of several (experts) put together.

    Scales, norms and biases on the way are looked through.
    """
    root = root_of(node)
    if root.op != "call_function" or depth == 0:
        return False
    if as_linear(editor, root) is not None:
        return True
    rule = rule_of(root)
    if isinstance(rule, (Normalization, Centring)):
        return _is_written(editor, rule.source, depth - 1)
    if isinstance(rule, Concatenate):
        return _is_written(editor, rule.sources[0], depth - 1)
    if not isinstance(rule, Multilinear) or op_name(root) not in _PUT_TOGETHER:
        return False
    return any(
        _is_written(editor, o.node, depth - 1) for term in rule.terms for o in term if not editor.is_constant(o.node)
    )


_PUT_TOGETHER = {
    f"aten::{n}"
    for n in (
        "mul",
        "add",
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

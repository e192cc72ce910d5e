"""Decompose:  f(x)  ->  g(h(x)),   where f has no rule and torch composes it of operators that all have one.

That node alone, in the graph itself: ``x.mT``, ``inner``, ``tensordot``, ``chain_matmul``. An operator that is composed
of others without a rule stays whole, for nothing would be gained.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch.fx import GraphModule, Node

from spinpass.analysis import Opaque, rule_of
from spinpass.graph import ProgramEditor, decomposed, frozen, is_float, is_op, shape, splice, value


def decompose(editor: ProgramEditor) -> None:
    """Replace the operators of the graph that have no rule, and are composed of some that have."""
    fruitless: set[Hashable] = set()
    for node in list(editor.nodes):
        if not is_op(node) or not is_float(node) or not isinstance(rule_of(node), Opaque):
            continue
        call = _call(node)
        if call in fruitless:
            continue
        parts = decomposed(editor, node)
        if parts is None or not _has_rules(parts):
            fruitless.add(call)
        else:
            splice(editor, node, parts)


def _call(node: Node) -> Hashable:
    """Return a key that is the same for calls that are composed alike."""

    def described(operand: Node) -> Hashable:
        return f"{shape(operand)} {getattr(value(operand), 'dtype', None)}"

    return node.target, frozen((node.args, node.kwargs), described)


def _has_rules(parts: GraphModule) -> bool:
    """Return whether each operator that reads an operand, or what was made of one, has a rule."""
    reads: set[Node] = set()
    for part in parts.graph.nodes:
        if part.op == "placeholder":
            reads.add(part)
        elif part.op == "call_function" and not reads.isdisjoint(part.all_input_nodes):
            reads.add(part)
            if isinstance(rule_of(part), Opaque) and (is_op(part) or is_float(part)):
                return False
    return True

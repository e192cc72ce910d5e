"""Linear layers: computed values contracted with weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from spinpass.graph import Layout, ProgramEditor, is_float, op_name, reachable, shape

from ..ops.rules import Movement, Multilinear, Normalization, Square, VectorNorm
from ..ops.table import may_contract, rule_of


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        node: the operator.
        operand: the computed value that it reads.
        dim: the axis of ``operand`` that is contracted.
        weight: a constant, or the expert matrices of a mixture that were gathered for each token.
        weight_dim: the axis of ``weight`` that is contracted.
    """

    node: Node
    operand: Node
    dim: int
    weight: Node
    weight_dim: int


def find_linears(editor: ProgramEditor) -> Iterator[Linear]:
    """Yield every linear layer, in the order of the graph."""
    for node in editor.nodes:
        found = as_linear(editor, node)
        if found is not None:
            yield found


def as_linear(editor: ProgramEditor, node: Node) -> Linear | None:
    """Return the node as a linear layer, or None where it is none."""
    if not may_contract(node) or not is_float(node) or editor.is_constant(node):
        return None
    rule = rule_of(node)
    if not isinstance(rule, Multilinear):
        return None
    for term in rule.terms:
        if len(term) != 2:
            continue
        x, w = term if editor.is_constant(term[1].node) or not editor.is_weight(term[0].node) else (term[1], term[0])
        if editor.is_weight(x.node) or not editor.is_weight(w.node):
            continue
        shared = [label for label in x.labels if label is not None and label in w.labels and label not in rule.out]
        if len(shared) == 1 and isinstance(shape(x.node)[x.labels.index(shared[0])], int):
            return Linear(node, x.node, x.labels.index(shared[0]), w.node, w.labels.index(shared[0]))
    return None


def root_of(node: Node) -> Node:
    """Return the operator that computed a value, views, casts and slices looked through."""
    while node.op == "call_function" and isinstance(rule := rule_of(node), Movement):
        node = rule.source
    return node


def normed_value(editor: ProgramEditor, node: Node) -> Node | None:
    """Return x where the value is x/‖x‖ along its last axis, perhaps with a scale and a bias; None for other values."""
    if node.op != "call_function":
        return None
    rule = rule_of(node)
    if isinstance(rule, Normalization):
        return rule.source
    if not isinstance(rule, Multilinear) or editor.is_constant(node):
        return None
    operands = [o.node for term in rule.terms for o in term]
    computed = [o for o in operands if not editor.is_constant(o)]
    if len(operands) == 2 and len(computed) == 1:
        return normed_value(editor, root_of(computed[0])) if op_name(node) in _AFFINE else None
    if len(computed) != 2 or not any(shape(o)[-1:] == (1,) and _is_norm_statistic(o) for o in computed):
        return None
    return next((o for o in computed if shape(o)[-1:] != (1,)), None)


def _is_norm_statistic(node: Node) -> bool:
    """Return whether the value comes from squares or a 2-norm, within a few operators."""
    made_by = (n for n in reachable(node, lambda n: n.all_input_nodes, _STEPS) if n.op == "call_function")
    return any(isinstance(rule_of(n), (Square, VectorNorm)) for n in made_by)


def whole_axis(node: Node, dim: int) -> Layout:
    """Return the layout in which axis ``dim``, whose size is static, is one vector."""
    size = shape(node)[dim]
    assert isinstance(size, int)
    return Layout.full(dim, size)


_STEPS = 7  # from a norm's factor to the squares that it is made of
_AFFINE = ("aten::mul", "aten::add", "aten::mul_", "aten::add_")

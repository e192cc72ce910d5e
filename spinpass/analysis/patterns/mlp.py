"""Down projections: linear layers that read a nonlinearity or a product of computed values."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch.fx import Node

from spinpass.graph import ProgramEditor, is_float, is_op, op_name, shape

from ..ops.rules import Centring, Multilinear, Normalization, Opaque, Square
from ..ops.table import rule_of
from .linear import Linear, find_linears, root_of
from .residual import find_residual_sums

ACTIVATIONS = (
    "aten::gelu",
    "aten::silu",
    "aten::relu",
    "aten::relu6",
    "aten::leaky_relu",
    "aten::tanh",
    "aten::sigmoid",
    "aten::hardswish",
    "aten::mish",
    "aten::softplus",
    "aten::elu",
    "aten::hardtanh",
    "aten::clamp",
    "aten::pow",
    "aten::square",
    "aten::relu_",
    "aten::silu_",
    "aten::erf",
    "aten::exp",
)


def find_down_projections(editor: ProgramEditor, sums: Collection[Node] | None = None) -> Iterator[Linear]:
    """Yield every linear layer whose input no rotation can pass, because it was computed channel by channel.

    Its result has to go on into the model, which means that it is summed with something and not turned into logits.
    ``sums`` are the residual sums, if they were found already.
    """
    found = find_residual_sums(editor) if sums is None else sums
    summed = {n for s in found for n in (s, *s.all_input_nodes)}
    for linear in find_linears(editor):
        if linear.dim != len(shape(linear.operand)) - 1 or not _is_activated(editor, root_of(linear.operand)):
            continue
        if not summed or any(n in summed for n in _downstream(linear.node)):
            yield linear


def _downstream(node: Node, steps: int = 20) -> Iterator[Node]:
    """Yield the value and what becomes of it within a few operators."""
    todo, seen = [(node, steps)], set()
    while todo:
        here, left = todo.pop(0)
        if here in seen or left == 0:
            continue
        seen.add(here)
        yield here
        todo += [(u, left - 1) for u in here.users if u.op == "call_function"]


def _is_activated(editor: ProgramEditor, node: Node, depth: int = 12) -> bool:
    """Return whether a nonlinearity or a product of two computed values, perhaps normed or scaled, made the value."""
    if not is_op(node) or depth == 0:
        return False
    rule = rule_of(node)
    if isinstance(rule, (Opaque, Square)):
        return op_name(node) in ACTIVATIONS
    if isinstance(rule, (Normalization, Centring)):
        return _is_activated(editor, root_of(rule.source), depth - 1)
    if not isinstance(rule, Multilinear) or op_name(node) not in _ELEMENTWISE:
        return False
    whole = [
        o.node
        for term in rule.terms
        for o in term
        if not editor.is_constant(o.node) and o.labels[-1:] == rule.out[-1:] and is_float(o.node)
    ]
    if len(rule.terms) == 1 and len(whole) > 1:
        return True
    if op_name(node) == "aten::where":
        return any(op_name(c) in _COMPARISONS for c in rule.opaque) or any(
            _is_activated(editor, root_of(n), depth - 1) for n in whole
        )
    # a sum of two computed values is a residual stream
    return len(whole) == 1 and _is_activated(editor, root_of(whole[0]), depth - 1)


_ELEMENTWISE = {"aten::mul", "aten::div", "aten::add", "aten::sub", "aten::where"}
_COMPARISONS = {"aten::gt", "aten::lt", "aten::ge", "aten::le"}

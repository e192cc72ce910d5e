"""Down projections: linear layers that read a nonlinearity or a product of computed values."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from ..ops import Multilinear, Opaque, Square, rule_of
from ..program import ProgramEditor, is_op, op_name
from .linear import Linear, find_linears, is_norm_output, root_of

_ACTIVATIONS = (
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


def find_down_projections(editor: ProgramEditor) -> Iterator[Linear]:
    """Every linear layer whose input no rotation can pass, because it was computed channel by channel."""
    for linear in find_linears(editor):
        if _is_activated(editor, root_of(linear.operand)):
            yield linear


def _is_activated(editor: ProgramEditor, node: Node) -> bool:
    if not is_op(node) or is_norm_output(editor, node):
        return False
    rule = rule_of(node)
    if isinstance(rule, (Opaque, Square)):
        return op_name(node) in _ACTIVATIONS
    if not isinstance(rule, Multilinear) or op_name(node) not in ("aten::mul", "aten::div", "aten::add"):
        return False
    operands = [o.node for term in rule.terms for o in term]
    computed = [o for o in operands if not editor.is_constant(o)]
    if len(rule.terms) == 1 and len(computed) == 2:
        return all(len(o.labels) == len(rule.out) and None not in o.labels for o in rule.terms[0])
    return (
        len(computed) == 1
        and len(operands) <= 2
        and op_name(node) != "aten::add"
        and _is_activated(editor, root_of(computed[0]))
    )

"""Which changes of basis a space admits: any invertible one, or orthogonal ones alone.

    (x A)(w A⁻ᵀ)ᵀ = x wᵀ  for every invertible A;   ‖x A‖ = ‖x‖  and  (x A)(y A)ᵀ = x yᵀ  for orthogonal ones

An invertible matrix passes where values of the space are moved, added, multiplied by what is none of it, and contracted
with constants, which take the other basis. A norm's statistic needs an orthogonal one. So does a product of two
computed values of the space, such as queries with keys, unless one of them takes the dual basis, where it is made of
weights or, behind a barrier such as RoPE, where it enters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

from spinpass.graph import ProgramEditor, op_name

from ..ops.rules import Concatenate, Ignored, Movement, Multilinear, Rule, Several, Zeros
from .sides import Sides, Unsided, by_sides
from .space import Space

Group = Literal["orthogonal", "invertible", "diagonal", "permutation"]
"""The last two are those of gates: a scale for each channel and an order of them, or the order alone."""
_PASSED = (Movement, Concatenate, Ignored, Zeros, Several)


@dataclass(frozen=True)
class Admitted:
    """The largest group of matrices that a space admits, and why no larger one, as a phrase.

    ``sides`` are the constants and entries of the space by the side of products that their values stand on. They are
    none where no two of its values are multiplied.
    """

    group: Group
    why: str
    sides: Sides = field(default=Sides(), compare=False)


def admitted_by(editor: ProgramEditor, space: Space, rule: Callable[[Node], Rule]) -> Admitted:
    """Return the group of matrices that a space admits.

    Args:
        editor: the program.
        space: of it.
        rule: gives the rule of a node, as :func:`spinpass.analysis.rule_of` does.
    """
    if space.scales or space.shifts or space.centrings or space.centred or any(e.centre for e in space.entries):
        return Admitted("orthogonal", "a norm measures it")
    inside = {node for node in space.members if not editor.is_weight(node)}
    leaving = {(x.node, user) for x in space.exits for user in x.users}
    kept = {(entry.node, user) for entry in space.entries for user in entry.keep}
    product = ""
    for node in inside:
        for user in node.users:
            if user.op != "call_function" or (node, user) in leaving or (node, user) in kept:
                continue
            found = rule(user)
            if isinstance(found, _PASSED):
                continue
            if not isinstance(found, Multilinear):
                return Admitted("orthogonal", f"{user.name} ({op_name(user)}) measures it")
            if any(sum(operand.node in inside for operand in term) > 1 for term in found.terms):
                product = product or f"{user.name} ({op_name(user)}) multiplies two of its values"
                if space.exits:
                    return Admitted("orthogonal", product)
    for use in space.constants:
        if _uses(editor, space, use.node, rule) != {use.reads}:
            return Admitted("orthogonal", f"{editor.fqn(use.node)} is not used in one way alone")
    if not product:
        return Admitted("invertible", "it is contracted with constants alone")
    try:
        sides = by_sides(editor, space)
    except Unsided as error:
        return Admitted("orthogonal", f"{product}, and {error}")
    return Admitted("invertible", "queries take the inverse transposed of what keys take", sides)


def _uses(editor: ProgramEditor, space: Space, constant: Node, rule: Callable[[Node], Rule]) -> set[bool | None]:
    """Return how a stored constant is used: contracted with a value of the space (True), or writing into it (False).

    None stands for what is neither, such as a weight that is computed with before it is multiplied by.
    """
    found: set[bool | None] = set()
    todo = [constant]
    while todo:
        node = todo.pop()
        for user in node.users:
            made = rule(user) if user.op == "call_function" else None
            if isinstance(made, Ignored):
                continue
            if isinstance(made, Movement) and made.source is node and user in space.members:
                todo.append(user)
            elif isinstance(made, Multilinear) and not editor.is_weight(user):
                found.add(_use(editor, space, node, made))
            else:
                found.add(None)
    return found


def _use(editor: ProgramEditor, space: Space, node: Node, rule: Multilinear) -> bool | None:
    """Return how a product uses a constant, as :func:`_uses`."""
    axes = {dim for axis in space.members.get(node, ()) for dim in axis.layout.dims}
    own = [operand for term in rule.terms for operand in term if operand.node is node]
    labels = {operand.labels[dim] for operand in own for dim in axes}
    beside = [o.node for term in rule.terms for o in term if o.node is not node and node in {p.node for p in term}]
    sharing = [o.node for term in rule.terms for o in term if o.node in beside and labels & set(o.labels)]
    if not labels or None in labels:
        return None
    if labels <= set(rule.out):
        return None if sharing else False
    values = [other for other in sharing if other in space.members and not editor.is_weight(other)]
    return True if labels.isdisjoint(rule.out) and len(sharing) == 1 == len(values) else None

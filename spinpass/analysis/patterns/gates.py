"""Channels between layers that are computed one by one:  down(act(g) · u)  =  down'(act(g P) · u P D),  P, D folded.

A permutation P passes whatever treats all channels alike. A scale for each channel, D, passes where the result is
linear in one of the operands, on that operand alone. Both leave by what reads the result, which takes their inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.graph import ProgramEditor, is_op, shape, value

from ..basis.group import admitted_by
from ..basis.growth import Barrier
from ..basis.space import AxisType, ConstantUse, Space
from ..basis.walk import Walk
from ..ops.rules import Ignored, Movement, Multilinear
from ..ops.table import rule_of
from .linear import Linear, root_of, whole_axis

_ONE_BY_ONE = "channels are computed one by one"


@dataclass(frozen=True)
class Gate:
    """Operators between layers that treat the channels of a vector one by one, and all alike.

    Attributes:
        permuted: all that a permutation of the channels is folded into, as one space without edges.
        scaled: what a scale for each channel is folded into likewise; None where the result is linear in no operand.
        parts: the spaces that these are made of: of the operands, then of the result.
    """

    permuted: Space
    scaled: Space | None
    parts: tuple[Space, ...]


def find_gate(editor: ProgramEditor, linear: Linear) -> Gate | str:
    """Return the gate in front of a linear layer, or as a phrase why no channel can be moved there.

    Args:
        editor: the program.
        linear: the layer, whose input has its channels on the last axis.
    """
    result = root_of(linear.operand)
    inside = _inside(editor, result)
    beside = dict.fromkeys(operand for node in inside for operand in _tensors(node) if operand not in inside)
    operands = [operand for operand in beside if shape(operand) == shape(result)]
    if not inside or not operands:
        return "no operator treats its channels one by one"
    into = [_grown(editor, operand, inside) for operand in operands]
    out = _grown(editor, result, inside)
    for operand, space in zip(operands, into, strict=True):
        outside = [user for leaving in space.exits for user in leaving.users if user not in inside]
        if space.entries or space.carried or not space.writers:
            return f"{operand.name} is not what a linear layer writes"
        if outside:
            return f"{outside[0].name} reads {operand.name} as it is"
    around = [user for node in inside - {result} for user in node.users if user not in inside | out.members.keys()]
    past = [user for user in around if not isinstance(rule_of(user), Ignored)]
    if past or out.exits or out.carried or any(e.node not in inside or e.keep for e in out.entries):
        return f"{past[0].name if past else result.name} is read elsewhere, too"
    if not out.readers or any(space.scales or space.shifts or space.centrings for space in (*into, out)):
        return "a norm is taken of it, or it is scaled channel by channel"
    linear_in = [space for space in into if _is_linear_in(result, {leaving.node for leaving in space.exits}, inside)]
    scaled = [space for space in linear_in if all(_admits_scales(editor, each) for each in (space, out))]
    return Gate(_together(result, [*into, out]), _together(result, [scaled[-1], out]) if scaled else None, (*into, out))


class _GateWalk(Walk):
    """A walk that stops at channels that are computed one by one."""

    def __init__(self, editor: ProgramEditor, inside: set[Node]) -> None:
        super().__init__(editor)
        self._inside = inside

    def _produce(self, node: Node, axis: AxisType) -> None:
        if node in self._inside:
            raise Barrier(_ONE_BY_ONE)
        super()._produce(node, axis)

    def _consume(self, node: Node, axis: AxisType, user: Node) -> None:
        if user in self._inside:
            raise Barrier(_ONE_BY_ONE)
        super()._consume(node, axis, user)


def _inside(editor: ProgramEditor, result: Node) -> set[Node]:
    """Return the operators on the way to a result that compute each element of the same ones of their operands."""
    found: set[Node] = set()
    todo = [result]
    while todo:
        node = todo.pop()
        if node in found or not _is_pointwise(node):
            continue
        wide = [each for each in _tensors(node) if shape(each)[-1:] not in ((), (1,))]
        if any(editor.is_constant(each) or shape(each) != shape(node) for each in wide):
            continue  # a bias, for example, which belongs to the layer in front
        found.add(node)
        todo += wide
    return found


def _is_pointwise(node: Node) -> bool:
    rule = rule_of(node) if is_op(node) else None
    same = isinstance(rule, Movement) and rule.is_identity
    return same or (is_op(node) and torch.Tag.pointwise in getattr(node.target, "tags", ()))


def _tensors(node: Node) -> list[Node]:
    return [operand for operand in node.all_input_nodes if isinstance(value(operand), Tensor)]


def _is_linear_in(result: Node, operands: set[Node], inside: set[Node]) -> bool:
    """Return whether a result is linear in operands together: each term of each operator on the way has one, once.

    There are several where one weight makes them.
    """
    known: dict[Node, bool | None] = dict.fromkeys(operands, True)  # None: it does not depend on them

    def state(node: Node) -> bool | None:
        if node not in known:
            known[node] = _state(node) if node in inside else None
        return known[node]

    def _state(node: Node) -> bool | None:
        states = {each: state(each) for each in node.all_input_nodes}
        if all(each is None for each in states.values()):
            return None
        rule = rule_of(node)
        if isinstance(rule, Movement):
            return states[rule.source]
        if not isinstance(rule, Multilinear) or any(states[each] is not None for each in rule.opaque):
            return False
        counts = [[states[o.node] for o in term if states.get(o.node) is not None] for term in rule.terms]
        return all(count == [True] for count in counts)

    return state(result) is True


def _admits_scales(editor: ProgramEditor, space: Space) -> bool:
    return admitted_by(editor, space, rule_of).group == "invertible"


def _grown(editor: ProgramEditor, node: Node, inside: set[Node]) -> Space:
    return _GateWalk(editor, inside).grow(node, whole_axis(node, len(shape(node)) - 1))


def _together(result: Node, spaces: list[Space]) -> Space:
    """Return spaces as one whose edges are those between them, where what is folded passes."""
    uses: dict[ConstantUse, None] = {use: None for space in spaces for use in space.constants}
    members = {node: types for space in spaces for node, types in space.members.items()}
    return replace(spaces[-1], seed=result, members=members, constants=tuple(uses), entries=(), exits=())

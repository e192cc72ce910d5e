"""What a program has to rotate, counted before the pass, and how much of it a plan covers.

Values are followed back from where they are used to the linear layers that computed them; a plan covers a place where
one of its spaces has one of those weights among its writers, or an online rotation between them and the use. A place
that no rotation can reach, because something works channel by channel between the linear layers, is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.analysis import (
    ACTIVATIONS,
    SOFTMAX,
    Multilinear,
    Opaque,
    Square,
    as_linear,
    find_attention,
    find_down_projections,
    rule_of,
)
from spinpass.config import ROLES, Role
from spinpass.graph import ProgramEditor, is_float, op_name
from spinpass.passes import open_program
from spinpass.planning import PlannedSpace, RotationPlan

_FARTHEST = 400  # operators between a linear layer and a use of what it computed


@dataclass(frozen=True)
class Place:
    """Something that one rotation is for: the node it is named after, the weights whose spaces are about it, and the
    operators at which an online rotation would be."""

    node: str
    weights: frozenset[str]
    between: frozenset[str]
    barrier: str | None = None

    def is_covered_by(self, space: PlannedSpace) -> bool:
        return bool(
            self.weights.intersection(space.writers + space.readers)
            or self.between.intersection(part.node for part in space.online)
        )


@dataclass(frozen=True)
class Structure:
    """The places of R2, R3 and R4 in a program."""

    places: dict[Role, tuple[Place, ...]]

    def counts(self) -> dict[str, int]:
        """How many places of every rotation have no barrier."""
        return {role: sum(p.barrier is None for p in places) for role, places in self.places.items()}

    def barriers(self) -> dict[str, str]:
        """Why the other places cannot be rotated, by node."""
        return {p.node: p.barrier for places in self.places.values() for p in places if p.barrier is not None}

    def covered(self, plan: RotationPlan) -> dict[str, int]:
        """How many of the places without a barrier the plan rotates."""
        return {
            role: sum(any(p.is_covered_by(s) for s in plan.spaces if s.role == role) for p in places if not p.barrier)
            for role, places in self.places.items()
        }


def values_of_attentions(editor: ProgramEditor) -> Iterable[Place]:
    """R2: what every softmax(q kᵀ) v weighs, up to the linear layers that read the result."""
    for attention in find_attention(editor):
        place = _place(editor, attention.node, attention.value)
        on_the_way = [n for n in editor.nodes if n.name in place.between] + list(_results(editor, attention.node))
        yield replace(place, barrier=next((why for n in on_the_way if (why := _barrier(editor, n))), None))


def queries_of_attentions(editor: ProgramEditor) -> Iterable[Place]:
    """R3: what every softmax(q kᵀ) v compares."""
    return [_place(editor, attention.node, attention.query) for attention in find_attention(editor)]


def down_projections(editor: ProgramEditor) -> Iterable[Place]:
    """R4: every linear layer that reads a nonlinearity."""
    return [
        Place(linear.node.name, frozenset({_fqn(editor, linear.weight)}), frozenset())
        for linear in find_down_projections(editor)
    ]


COUNTED: dict[Role, Callable[[ProgramEditor], Iterable[Place]]] = {
    "R2": values_of_attentions,
    "R3": queries_of_attentions,
    "R4": down_projections,
}


def structure_of(program: ExportedProgram) -> Structure:
    """Count what there is to rotate. The program is not changed."""
    editor = open_program(program)
    return Structure({role: tuple(COUNTED[role](editor)) for role in ROLES if role in COUNTED})


def _place(editor: ProgramEditor, node: Node, operand: Node) -> Place:
    weights, between = set[str](), set[str]()
    todo = [operand]
    while todo and len(between) < _FARTHEST:
        here = todo.pop(0)
        if here.name in between or here.op != "call_function" or editor.is_constant(here):
            continue
        between.add(here.name)
        linear = as_linear(editor, here)
        if linear is None:
            todo += here.all_input_nodes
        else:
            weights.add(_fqn(editor, linear.weight))
    return Place(node.name, frozenset(weights), frozenset(between))


def _results(editor: ProgramEditor, attention: Node) -> Iterator[Node]:
    """What becomes of the weighted values before linear layers read them."""
    todo, seen = [attention], {attention}
    weighed = op_name(attention) not in SOFTMAX
    while todo and len(seen) < _FARTHEST:
        here = todo.pop(0)
        for user in here.users:
            if user in seen or user.op != "call_function" or as_linear(editor, user) is not None:
                continue
            seen.add(user)
            if weighed:
                yield user
            elif _contracts(user):  # softmax · v: what follows is about values
                todo, weighed = [user], True
                break
            todo.append(user)


def _contracts(node: Node) -> bool:
    rule = rule_of(node)
    return isinstance(rule, Multilinear) and any(
        set(a.labels) & set(b.labels) - set(rule.out) - {None} for a, *rest in rule.terms for b in rest
    )


def _barrier(editor: ProgramEditor, node: Node) -> str | None:
    """What keeps any rotation of the last axis from passing the operator."""
    if not is_float(node) or node.op != "call_function":
        return None
    name, rule = op_name(node), rule_of(node)
    if name in ACTIVATIONS and not isinstance(rule, Square):  # squares are summed in norms
        return f"{name} of every channel"
    if name in ("aten::conv1d", "aten::convolution") and isinstance(rule, Opaque):
        return "a convolution of every channel"
    if isinstance(rule, Multilinear):
        for term in rule.terms:
            computed = [o for o in term if not editor.is_constant(o.node) and is_float(o.node)]
            if sum(o.labels[-1:] == rule.out[-1:] != (None,) for o in computed) > 1:
                return "a product of two computed values, channel by channel"
    return None


def _fqn(editor: ProgramEditor, constant: Node) -> str:
    """The name of the parameter that a computed constant is made of."""
    while not editor.is_stored(constant) and constant.all_input_nodes:
        constant = constant.all_input_nodes[0]
    return editor.fqn(constant)

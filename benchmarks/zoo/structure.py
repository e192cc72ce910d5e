"""What a program has to rotate, counted before the pass, and how much of it a plan covers.

Values are followed back from where they are used to the linear layers that computed them; a plan covers a place where
one of its spaces has one of those weights among its writers, or an online rotation between them and the use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.config import ROLES, Role
from spinpass.passes.functionalize import open_program
from spinpass.patterns.attention import find_attention
from spinpass.patterns.linear import as_linear
from spinpass.patterns.mlp import find_down_projections
from spinpass.planning import PlannedSpace, RotationPlan
from spinpass.program import ProgramEditor

_FARTHEST = 400  # operators between a linear layer and a use of what it computed


@dataclass(frozen=True)
class Place:
    """Something that one rotation is for: the node it is named after, the weights whose spaces are about it, and the
    operators at which an online rotation would be."""

    node: str
    weights: frozenset[str]
    between: frozenset[str]

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
        return {role: len(places) for role, places in self.places.items()}

    def covered(self, plan: RotationPlan) -> dict[str, int]:
        """How many places of every rotation the plan rotates."""
        return {
            role: sum(any(p.is_covered_by(s) for s in plan.spaces if s.role == role) for p in places)
            for role, places in self.places.items()
        }


def values_of_attentions(editor: ProgramEditor) -> Iterable[Place]:
    """R2: what every softmax(q kᵀ) v weighs."""
    return [_place(editor, attention.node, attention.value) for attention in find_attention(editor)]


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


def _fqn(editor: ProgramEditor, constant: Node) -> str:
    """The name of the parameter that a computed constant is made of."""
    while not editor.is_stored(constant) and constant.all_input_nodes:
        constant = constant.all_input_nodes[0]
    return editor.fqn(constant)

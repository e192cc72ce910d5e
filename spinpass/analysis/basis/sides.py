"""On which side of products the values of a space stand:  q kᵀ = (q A⁻ᵀ)(k A)ᵀ.

Where a product contracts two values of a space, one is in the basis A and the other in the dual one, A⁻ᵀ; what moves,
adds up or passes through a product stays on its side. So a walk that stops in front of such products finds one side,
and walks from what it met there find the other. Where a side meets itself, as in x xᵀ, only orthogonal matrices do,
which are their own dual.

A value that enters behind a barrier, such as a query behind RoPE, takes the matrix of its side where it enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from spinpass.graph import Layout, LayoutError, ProgramEditor

from ..ops.rules import Multilinear, Operand
from .heads import HeadWalk
from .space import AxisType, ConstantUse, Entry, Space


class Unsided(Exception):
    """Something would have to be on both sides: the reason, as a phrase."""


@dataclass(frozen=True)
class Sides:
    """A space told apart by the side of products that its values stand on.

    Attributes:
        constants: those of the space, each with its side.
        entries: likewise.
    """

    constants: tuple[ConstantUse, ...] = ()
    entries: tuple[Entry, ...] = ()


class SideWalk(HeadWalk):
    """A walk within a space that stops where two computed values are contracted.

    Attributes:
        met: what stands on the other side of those products, and where its vectors lie.
    """

    def __init__(self, editor: ProgramEditor, space: Space) -> None:
        super().__init__(editor, cache=space.members.keys())
        self.met: dict[Node, Layout] = {}

    def _contract(
        self, rule: Multilinear, at: Operand, axis: AxisType, names: dict[int, object], mixing: set[object], user: Node
    ) -> None:
        term = next(t for t in rule.terms if any(o is at for o in t))
        others = [o for o in term if o is not at and mixing & set(o.labels)]
        if len(others) != 1 or self.editor.is_weight(at.node) or self.editor.is_weight(others[0].node):
            return super()._contract(rule, at, axis, names, mixing, user)
        labels = others[0].labels
        self.met[others[0].node] = axis.layout.renamed({d: labels.index(n) for d, n in names.items()})

    def _check_all_or_none(self) -> None:
        """Do nothing: the walk that has found the space did, and this one leaves out what that has reached."""


def by_sides(editor: ProgramEditor, space: Space) -> Sides:
    """Tell a space apart by the sides of its values: the seed's is the dual one, that of caches is not.

    Args:
        editor: the program.
        space: of it, from a walk.

    Raises:
        Unsided: a value would have to be on both, or a walk of one side meets what the walk of the space did not.
    """
    found: dict[bool, list[Space]] = {True: [], False: []}
    todo = [(space.seed, space.members[space.seed][0].layout, True)]
    while todo:
        node, layout, side = todo.pop()
        if any(node in part.members for part in found[side]):
            continue
        if any(node in part.members for part in found[not side]) and _overlap(node, layout, found[not side]):
            raise Unsided(f"{node.name} would be on both sides of a product")
        walk = SideWalk(editor, space)
        part = walk.grow(node, layout)
        stranger = next((edge for edge in part.online if edge not in space.entries), None)
        if stranger is not None:
            raise Unsided(f"its sides cannot be told apart at {stranger.node.name}")
        found[side].append(part)
        todo += [(other, where, not side) for other, where in walk.met.items()]
    if any(part.carried for part in found[True]):
        raise Unsided("a cache would be in the dual basis")
    return Sides(_constants(editor, space, found), _entries(editor, space, found))


def _constants(editor: ProgramEditor, space: Space, found: Mapping[bool, Sequence[Space]]) -> tuple[ConstantUse, ...]:
    """Return the constants of a space, each with its side. Raises Unsided where one is not all of the two together."""
    uses = {
        (use.node, use.type.layout): replace(use, swapped=side)
        for side, parts in found.items()
        for part in parts
        for use in part.constants
    }
    for use in space.constants:
        try:
            whole = _joined([layout for node, layout in uses if node is use.node])
        except LayoutError:
            whole = None
        if whole != use.type.layout:
            raise Unsided(f"{editor.fqn(use.node)} would be on both sides of a product")
    return tuple(uses.values())


def _entries(editor: ProgramEditor, space: Space, found: Mapping[bool, Sequence[Space]]) -> tuple[Entry, ...]:
    """Return the entries of a space, each with its side; none where there are none.

    Raises Unsided: one is on no side or on both, or a value or a cache of the space was reached from neither.
    """
    if not space.entries:
        return ()
    sides = {side: [each for part in parts for each in part.entries] for side, parts in found.items()}
    for entry in space.entries:
        if (entry in sides[True]) == (entry in sides[False]):
            raise Unsided(f"{entry.node.name} would be on both sides of a product")
    reached = {node for parts in found.values() for part in parts for node in part.members}
    for node in space.members:
        if node not in reached and not editor.is_weight(node):
            raise Unsided(f"{node.name} is on no side of a product")
    carried = [edge for part in found[False] for edge in part.carried]
    for edge in (*carried, *space.carried):
        if edge not in carried or edge not in space.carried:
            raise Unsided(f"the cache at {edge.node.name} is on no side of a product")
    return tuple(replace(entry, dual=entry in sides[True]) for entry in space.entries)


def _overlap(node: Node, layout: Layout, parts: Sequence[Space]) -> bool:
    return any(axis.layout.overlaps(layout) for part in parts for axis in part.members.get(node, ()))


def _joined(layouts: list[Layout]) -> Layout | None:
    whole: Layout | None = None
    for layout in layouts:
        if whole is not None and whole.overlaps(layout):
            raise LayoutError("sides overlap")
        whole = layout if whole is None else whole.joined(layout)
    return whole

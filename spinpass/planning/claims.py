"""Which parts of which values are rotated already, and by which space."""

from __future__ import annotations

from torch.fx import Node

from spinpass.analysis import Space
from spinpass.config import Role
from spinpass.graph import Layout


class Claims:
    """What is rotated already. Two rotations may meet in one tensor, but never on the same axes and elements."""

    def __init__(self) -> None:
        self._held: dict[Node, list[tuple[str, Layout]]] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._held

    def take(self, name: str, space: Space) -> None:
        """Give every vector of the space to the rotation called ``name``."""
        for node, types in space.members.items():
            self._held.setdefault(node, []).extend((name, t.layout) for t in types)

    def overlap(self, node: Node, layout: Layout) -> bool:
        """Return whether some element of the layout in ``node`` is rotated already."""
        return any(held.overlaps(layout) for _, held in self._held.get(node, ()))

    def conflict(self, space: Space, over: Role | None) -> tuple[Node, str] | None:
        """Return a value in which the new space meets another, and the other's name; None where it meets none.

        ``over`` is the rotation whose blocks this one may lie on top of.
        """
        for node, types in space.members.items():
            for other, held in self._held.get(node, ()):
                if held.count > 1 and other.split(":")[0] == over:
                    continue
                if any(held.overlaps(t.layout) for t in types):
                    return node, other
        return None

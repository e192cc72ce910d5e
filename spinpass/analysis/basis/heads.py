"""A space that all heads share, as one space for each head, each with a matrix of its own.

    diag(A1, A2, …)  on the vector of all heads,  Aₖ on head k;  query heads have the matrix of the head that they read

Nothing about heads is assumed: from one vector of what a weight writes, another walk grows. Where such walks end
without an edge, and share the constants of the whole space among them, each of them may have a basis of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from spinpass.graph import Layout, LayoutError, ProgramEditor

from .space import CacheEdge, ConstantUse, Space
from .walk import Walk


@dataclass(frozen=True)
class Heads:
    """What a space is made of.

    Attributes:
        parts: the space of each head.
        whole: all of them as one, whose vectors are those of the heads side by side. Its members are those of the
            space that heads share.
    """

    parts: tuple[Space, ...]
    whole: Space


class HeadWalk(Walk):
    """A walk of one head, which may lie in a cache beside the others."""

    def _may_be_carried(self, layout: Layout) -> bool:
        return True


def head_count(editor: ProgramEditor, space: Space) -> int:
    """Return how many matrices an offline space takes, one for each head, as far as the first head tells; 1 for one."""
    found = _written(editor, space)
    if found is None or found[1].count == 1:
        return 1
    first = _grown(editor, space, *found, 0)
    return found[1].count // first.members[found[0]][0].layout.count if first.is_offline else 1


def by_heads(editor: ProgramEditor, space: Space) -> Heads | str:
    """Return the spaces of the heads that share a space, or as a phrase why they cannot have bases of their own.

    Args:
        editor: the program.
        space: offline, from a walk, its constants perhaps by the side of products that their values stand on.
    """
    found = _written(editor, space)
    if found is None:
        return "no layer writes it"
    value, layout = found
    parts: list[Space] = []
    for head in range(layout.count):
        if any(axis.layout.overlaps(_one(layout, head)) for part in parts for axis in part.members[value]):
            continue  # queries and keys of one layer
        part = _grown(editor, space, value, layout, head)
        if not part.is_offline:
            edge = part.online[0]
            return f"head {len(parts) + 1} cannot be told from the others at {edge.node.name}: {edge.why}"
        parts.append(part)
    constants: list[ConstantUse] = []
    for use in space.constants:
        beside = [other for other in space.constants if other.node is use.node]
        try:
            layouts = [_within(_of(part, use.node), use.type.layout, len(beside) > 1) for part in parts]
            wide = _side_by_side(layouts, use.type.layout)
        except LayoutError:
            return f"heads share parts of {editor.fqn(use.node)}"
        constants.append(replace(use, type=replace(use.type, layout=wide)))
    carried: list[CacheEdge] = []
    for cached in space.carried:
        layouts = [each.layout for part in parts for each in part.carried if _same(each, cached)]
        try:
            carried.append(replace(cached, layout=_plain(layouts, cached.layout, len(parts))))
        except LayoutError:
            return f"the cache at {cached.node.name} does not keep each head once, in their order"
    width = space.width * len(parts)
    return Heads(tuple(parts), replace(space, width=width, constants=tuple(constants), carried=tuple(carried)))


def _written(editor: ProgramEditor, space: Space) -> tuple[Node, Layout] | None:
    """Return the value that a weight writes into the space with the fewest vectors, and where they lie in it."""
    found: list[tuple[Node, Layout]] = []
    for node, types in space.members.items():
        weights = [n for n in node.all_input_nodes if editor.is_weight(n) and n in space.members]
        if node.op == "call_function" and not editor.is_weight(node) and weights and len(types) == 1:
            found.append((node, types[0].layout))
    return min(found, key=lambda pair: pair[1].count, default=None)


def _grown(editor: ProgramEditor, space: Space, value: Node, layout: Layout, head: int) -> Space:
    """Return the space of one head. What the walk of the whole space has left in caches may stay in them."""
    return HeadWalk(editor, cache=space.members.keys()).grow(value, _one(layout, head))


def _one(layout: Layout, head: int) -> Layout:
    return Layout(layout.dims, layout.sizes, layout.blocks[head : head + 1])


def _of(part: Space, constant: Node) -> Layout:
    """Return where a head lies in a constant. Raises LayoutError: nowhere, or on two axes."""
    found = [use.type.layout for use in part.constants if use.node is constant]
    if len(found) != 1:
        raise LayoutError("heads are not on one axis")
    return found[0]


def _within(layout: Layout, side: Layout, shared: bool) -> Layout:
    """Return the vectors of a layout that are of one side of products, where the constant is of both.

    Raises LayoutError: there are none, or they do not lie alike.
    """
    if not shared:
        return layout
    if (layout.dims, layout.sizes) != (side.dims, side.sizes):
        raise LayoutError("sides do not lie alike")
    inside = torch.isin(layout.blocks, side.blocks).all(1)
    return Layout(layout.dims, layout.sizes, layout.blocks[inside])


def _same(one: CacheEdge, other: CacheEdge) -> bool:
    return one.node is other.node and one.output == other.output


def _side_by_side(layouts: list[Layout], shared: Layout) -> Layout:
    """Return where the vectors of all heads lie that are made of one of each.

    Raises LayoutError: heads overlap, are not all of the ``shared`` layout, or do not lie alike.
    """
    first = joined = layouts[0]
    for layout in layouts[1:]:
        if (layout.dims, layout.sizes, layout.count) != (first.dims, first.sizes, first.count):
            raise LayoutError("heads do not lie alike")
        joined = joined.joined(layout)
    if joined != shared:
        raise LayoutError("heads are only a part")
    return Layout(first.dims, first.sizes, torch.cat([layout.blocks for layout in layouts], 1))


def _plain(layouts: list[Layout], shared: Layout, count: int) -> Layout:
    """Return where the vector of all heads lies in a cache, which it fills in order along one axis or two.

    Raises LayoutError: it does not.
    """
    wide = _side_by_side(layouts, shared) if len(layouts) == count else shared
    in_order = torch.equal(wide.blocks.flatten(), torch.arange(wide.blocks.numel(), device="cpu"))
    if len(layouts) != count or len(wide.dims) > 2 or wide.count != 1 or not in_order:
        raise LayoutError("a cache has heads elsewhere")
    return wide

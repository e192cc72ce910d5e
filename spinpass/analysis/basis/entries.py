"""Where the online rotations of a space stand best.

They stand behind views that only rearrange, and behind operators in which several of them meet. The space is the same,
but fewer or cheaper Hadamards make it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import Node

from spinpass.graph import elements, is_float

from ..ops.rules import Ignored, Movement, Rule
from .space import Entry, Space


def settled(space: Space, rule: Callable[[Node], Rule]) -> Space:
    """Return the space with its entries moved to where they cost least.

    ``rule`` gives the rule of a node, as :func:`spinpass.analysis.rule_of` does.
    """
    return _hoisted(_sunk(space, rule), rule)


def _hoisted(space: Space, rule: Callable[[Node], Rule]) -> Space:
    """Return the space with fewer online rotations.

    Where several entries meet in one operator and go nowhere else, its result is rotated in their place.
    """
    entries = {e.node: e for e in space.entries}
    inner: dict[Node, set[Node] | None] = {}  # member -> the entries it is made of alone, None if of anything else

    def made_of(node: Node) -> set[Node] | None:
        if node in entries:
            return {node}
        if node not in inner:
            inner[node] = None
            sources = [s for s in node.all_input_nodes if s in space.members] if node.op == "call_function" else []
            parts = [made_of(s) for s in sources]
            if sources and all(p is not None for p in parts):
                inner[node] = set().union(*(p for p in parts if p is not None))
        return inner[node]

    for node in list(space.members):
        if node in entries or len(space.members[node]) != 1 or not is_float(node):
            continue
        made = made_of(node)
        if made is None or len(made) < 2 or not made <= set(entries):
            continue
        cone = _cone(node, made, space)
        if not all(_leads_only_to(node, cone, n, entries, rule) for n in (*cone, *made)):
            continue
        if elements(node) >= sum(elements(e) for e in made):
            continue
        first = entries[next(iter(made))]
        for e in made:
            del entries[e]
        leaving = tuple(u for x in space.exits if x.node is node for u in x.users)
        entries[node] = Entry(node, space.members[node][0].layout, leaving, first.why, first.centre)
        gone = cone | made
        return _hoisted(
            replace(
                space,
                entries=tuple(entries.values()),
                members={n: t for n, t in space.members.items() if n not in gone},
                exits=tuple(x for x in space.exits if x.node is not node),
            ),
            rule,
        )
    return space


def _sunk(space: Space, rule: Callable[[Node], Rule]) -> Space:
    """Move entries whose vectors lie across axes behind the view that makes them one axis, if only it reads them."""
    entries = []
    members = dict(space.members)
    for entry in space.entries:
        while not entry.layout.is_contiguous:
            readers = [u for u in entry.node.users if u not in entry.keep and not _ignores(u, rule)]
            if len(readers) != 1 or len(members.get(readers[0], ())) != 1 or readers[0].op != "call_function":
                break
            moved = rule(readers[0])
            if not isinstance(moved, Movement) or moved.source is not entry.node:
                break
            leaving = tuple(u for x in space.exits if x.node is readers[0] for u in x.users)
            del members[entry.node]
            entry = replace(entry, node=readers[0], layout=members[readers[0]][0].layout, keep=leaving)
        entries.append(entry)
    entered = {e.node for e in entries}
    return replace(
        space,
        entries=tuple(entries),
        members=members,
        exits=tuple(x for x in space.exits if x.node not in entered),
    )


def _cone(node: Node, entries: set[Node], space: Space) -> set[Node]:
    """Return everything of the space strictly between ``entries`` and ``node``."""
    found: set[Node] = set()
    todo = [s for s in node.all_input_nodes if s in space.members and s not in entries]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += [s for s in here.all_input_nodes if s in space.members and s not in entries]
    return found


def _leads_only_to(
    node: Node, cone: set[Node], inner: Node, entries: dict[Node, Entry], rule: Callable[[Node], Rule]
) -> bool:
    """Return whether no reader of ``inner`` outside the cone needs it in the space's basis."""
    keep = entries[inner].keep if inner in entries else ()
    return all(u in cone or u is node or u in keep or _ignores(u, rule) for u in inner.users)


def _ignores(user: Node, rule: Callable[[Node], Rule]) -> bool:
    """Return whether only the shape or dtype of its operands matters to ``user``."""
    return user.op == "call_function" and isinstance(rule(user), Ignored)

"""What a growing space knows: which axes are in it, what was assumed, and what to do where two demands contradict."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import replace

from torch.fx import Node

from spinpass.errors import InvariantError
from spinpass.graph import Layout, LayoutError, ProgramEditor, elements, is_float, shape

from ..ops.rules import Rule
from ..ops.table import rule_of
from .space import AxisType, ShiftUse


class Barrier(Exception):
    """An operator does not commute with a rotation of the axis."""


class Restart(Exception):
    """An assumption of the walk turned out wrong; it was recorded and the walk starts again."""


class Growth:
    """The state of a walk, and the demands that it makes of values.

    Args:
        editor: the program, which is not edited.
        cache: the values that a KV cache may hold. Program inputs and outputs among them, or moved from them, may be in
            the space's basis.
    """

    def __init__(self, editor: ProgramEditor, *, cache: Collection[Node] = ()) -> None:
        self.editor = editor
        self.cache = cache
        self.kept: dict[Node, str] = {}
        self._closed: dict[Node, str] = {}  # operators treated as barriers after a contradiction
        self._uncrossed: dict[Node, str] = {}  # scales that cannot be moved into constants
        self._computed: set[Node] = set()  # constant expressions that fold as a whole, all axes of them

    def _begin(self, seed: Node) -> None:
        """Forget everything but the assumptions."""
        self._seed = seed
        self.types: dict[Node, list[AxisType]] = {}
        self._todo: deque[tuple[Node, AxisType]] = deque()
        self._entries: dict[tuple[Node, tuple[int, ...]], str] = {}
        self._exits: dict[tuple[Node, Node, tuple[int, ...]], tuple[AxisType, str]] = {}
        self._carried: dict[tuple[Node, int | None], Layout] = {}
        self._scales: dict[Node, None] = {}
        self._shifts: dict[tuple[Node, Node], ShiftUse] = {}
        self._centrings: dict[Node, None] = {}
        self._uncentred_uses: list[tuple[Node, str]] = []
        self._same_scale: list[tuple[Node, Node, Node | None]] = []
        self._by: Node = seed
        self._stale = False  # a scale that was crossed is known by now to have to stay

    def _demand(self, node: Node, axis: AxisType) -> None:
        """Let ``node`` carry ``axis``, together with what it carries already.

        Raises:
            Barrier: it cannot carry the axis.
            Restart: it cannot carry both.
        """
        if node in self.kept:
            raise Barrier(self.kept[node])
        if not axis.layout.dims:  # a view has dropped it, and without an axis no two demands are ever the same
            raise Barrier(f"what {node.name} holds is one channel, which no rotation changes")
        sizes = shape(node)
        if any(d >= len(sizes) or sizes[d] != size for d, size in zip(axis.layout.dims, axis.layout.sizes)):
            raise Barrier(f"{node.name} has no axis that could hold {axis.layout}")
        if not is_float(node):
            raise Barrier(f"{node.name} holds no floating-point values of 16 bits or more")
        if axis.pending is not None and not all(
            fits(moved, axis.layout) for moved in (axis.pending.scale, axis.pending.shift)
        ):
            raise Barrier("a scale per channel of several vectors is rearranged")
        if not axis.centred and self._is_centred(node, axis):
            axis = replace(axis, centred=True)
        known = self.types.setdefault(node, [])
        for old in known:
            if not set(old.layout.dims) & set(axis.layout.dims):
                continue
            if old.pending != axis.pending:
                self._contradiction(node, "its uses need different scales folded in")
            try:
                layout = old.layout.joined(axis.layout)
            except LayoutError as error:
                self._contradiction(node, str(error))
            both = AxisType(layout, old.pending, old.centred and axis.centred, old.reads or axis.reads)
            if both == old and both.reads == old.reads:
                return
            known.remove(old)
            self._forget(node, old)
            axis = both
        known.append(axis)
        self._todo.append((node, axis))

    def _is_centred(self, node: Node, axis: AxisType) -> bool:
        """Return whether the space's vectors in ``node`` have no mean, whatever they are made of."""
        return False

    def _forget(self, node: Node, axis: AxisType) -> None:
        """Forget the edges of an axis that was widened: what stopped the narrower one need not stop it."""
        self._entries.pop((node, axis.layout.dims), None)
        for key in [k for k in self._exits if k[0] is node]:
            del self._exits[key]

    def _contradiction(self, node: Node, why: str) -> None:
        """Keep the constant, or close the operator that has made the demand, and start again."""
        if self.editor.is_weight(node):
            raise self._assuming(self.kept, node, why)
        if self._by in self._closed and not self._stale:
            raise InvariantError(f"{self._by.name} is closed and still contradicts")
        raise self._assuming(self._closed, self._by, why)

    def _assuming(self, assumptions: dict[Node, str], node: Node, why: str) -> Restart:
        """Note that a node stays as it is, unless the walk goes on under an assumption that is known to be wrong."""
        if not self._stale:
            assumptions[node] = why
        return Restart()

    def _leave_zone(self, axis: AxisType, why: str) -> None:
        """Let a pending scale stay where it is, because something else than a linear meets the value.

        The walk goes on, to find all scales that have to stay, and starts again when it is through.
        """
        assert axis.pending is not None
        if axis.pending.origin is None:
            raise InvariantError("a pending scale without an origin")
        self._uncrossed.setdefault(axis.pending.origin, why)
        self._stale = True

    def _rule(self, node: Node) -> Rule:
        return rule_of(node)

    def _rule_or_none(self, node: Node) -> Rule | None:
        """Return the rule of an operator, and None for a node that is none."""
        return self._rule(node) if node.op == "call_function" else None

    def _need_plain(self, axis: AxisType, why: str) -> None:
        if axis.pending is not None:
            raise Barrier(why)

    def _note_uncentred(self, node: Node, axis: AxisType, why: str) -> None:
        """Note a use of the stream that would see it being centred."""
        if not axis.centred and not self.editor.is_weight(node):
            self._uncentred_uses.append((node, why))

    def _is_whole(self, node: Node, layout: Layout) -> bool:
        """Return whether the space's one vector is the whole last axis."""
        return layout.count == 1 and layout.is_contiguous and layout.dims == (len(shape(node)) - 1,)

    def _canonical(self, node: Node | None) -> Node | None:
        return node if node is None else self.editor.canonical(node)


def fits(scale: Node | None, layout: Layout) -> bool:
    """Return whether there is one scale for every vector of the layout, or one for all of them side by side."""
    if scale is None:
        return True
    if not all(isinstance(size, int) for size in shape(scale)):
        return False
    count = elements(scale)
    return count == layout.width or (count == layout.width * layout.count and layout.is_contiguous)

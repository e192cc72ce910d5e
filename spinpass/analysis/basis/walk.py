"""The basis analysis: which tensor axes must share one basis.

A *space* grows from a seed axis through every operator that commutes with a rotation of that axis, in both directions,
until each of its edges is accounted for: constants that lie in the space (they fold), contractions (they cancel), norm
statistics (they do not change), and barriers. Where a value enters the space behind a barrier stands an
:class:`~.space.Entry`, where one leaves it for an operator that needs the original basis an :class:`~.space.Exit`.
There an online rotation makes the program right, whatever the configuration then decides. The analysis reads the graph
and never edits it; ``ops/table.py`` says what each operator does.

Two operators are crossed although no rotation passes them, because they can be moved into constants first:

    x̂ · g (+ β) -> W    a norm's scale, if all that follows are linears:     x̂ -> W·diag(g), b + β Wᵀ
    y = W x,  y · c     a per-channel scale on a writer alone:                y = diag(c)·W x
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from spinpass.errors import InvariantError
from spinpass.graph import (
    Layout,
    LayoutError,
    ProgramEditor,
    arguments,
    elements,
    is_float,
    is_op,
    op_name,
    reachable,
    shape,
)

from ..ops.rules import (
    Centring,
    Concatenate,
    Ignored,
    Mean,
    Movement,
    Multilinear,
    Normalization,
    Opaque,
    Operand,
    Rule,
    Several,
    Square,
    VectorNorm,
    Zeros,
)
from ..ops.table import rule_of
from .entries import settled
from .space import AxisType, CacheEdge, ConstantUse, Entry, Exit, Pending, ShiftUse, Space


class Barrier(Exception):
    """An operator does not commute with a rotation of the axis."""


class _Restart(Exception):
    """An assumption of the walk turned out wrong; it was recorded and the walk starts again."""


class Walk:
    """The growth of a space from a seed.

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

    def grow(self, seed: Node, layout: Layout) -> Space:
        """Return the space of the axes of ``seed`` that ``layout`` says.

        There always is one, because what does not commute is an entry or an exit. It has no members where the seed is
        a constant that has to stay as it is.

        Raises:
            InvariantError: the walk does not settle, which is a bug in spinpass.
        """
        for _ in range(len(self.editor.graph.nodes)):
            try:
                return self._grow_once(seed, layout)
            except _Restart:
                continue
        raise InvariantError(f"the walk from {seed.name} does not settle")

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _grow_once(self, seed: Node, layout: Layout) -> Space:
        """Grow the space under the assumptions so far.

        Raises:
            _Restart: one of them is wrong.
        """
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
        try:
            self._demand(seed, AxisType(layout))
        except Barrier:  # a constant that stays as it is
            return self._result(seed, layout)
        while self._todo:
            node, axis = self._todo.popleft()
            if axis not in self.types[node]:
                continue  # widened since
            self._by = node
            self._backward(node, axis)
            for user in list(node.users):
                self._by = user
                self._forward(node, axis, user)
        if self._stale:
            raise _Restart
        for weight, operand, scale in self._same_scale:
            if not any(t.pending is not None and t.pending.scale is scale for t in self.types.get(operand, ())):
                raise self._assuming(self.kept, weight, "its uses need different scales folded in")
        self._check_all_or_none()
        if self._centrings:
            self._check_centred_constants()
        if self._centrings and self._uncentred_uses:
            node, why = self._uncentred_uses[0]
            for centring in self._centrings:
                self._uncrossed[centring] = f"the stream cannot be centred: {node.name} {why}"
            raise _Restart
        self._check_exits()
        return self._result(seed, layout)

    def _check_exits(self) -> None:
        """Close operators whose results would leave the space where no rotation can stand: operands leave instead.

        Raises:
            _Restart: there are such.
        """
        left: dict[Node, set[tuple[int, ...]]] = {}
        for node, _, dims in self._exits:
            left.setdefault(node, set()).add(dims)
        entered = {node for node, _ in self._entries}
        found = False
        for (node, _, _), (axis, why) in self._exits.items():
            if axis.layout.is_contiguous and len(left[node]) == 1:
                continue
            inner = node.op == "call_function" and node is not self._seed and not self.editor.is_weight(node)
            if inner and node not in entered and node not in self._closed:
                self._closed[node] = why
                found = True
        if found:
            raise _Restart

    def _check_centred_constants(self) -> None:
        """Keep a constant that is centred where it writes and is read as well: what reads with it may be uncentred."""
        for constant, types in self.types.items():
            if self.editor.is_weight(constant) and any(t.reads and not t.centred for t in types):
                raise self._assuming(
                    self.kept, constant, "it would have to be centred where it writes, and is read as well"
                )

    def _check_all_or_none(self) -> None:
        """Make sure that an operator is linked to the space through all its ports or through none."""
        entered = {node for node, _ in self._entries}
        left = {(node, user) for node, user, _ in self._exits}
        for (_, user, _), (_, why) in self._exits.items():
            if user in self.types and user not in entered:
                raise self._assuming(self._closed, user, why)
        for node in entered - self._closed.keys():
            for source in node.all_input_nodes:
                if (
                    source in self.types
                    and not self.editor.is_weight(source)
                    and (source, node) not in left
                    and not self._is_statistic(source, node)
                ):
                    why = next(why for (n, _), why in self._entries.items() if n is node)
                    raise self._assuming(self._closed, node, why)

    def _is_statistic(self, node: Node, user: Node) -> bool:
        """Return whether ``user`` reads nothing of ``node`` that a rotation would change."""
        if user.op != "call_function":
            return False
        rule = self._rule(user)
        return isinstance(rule, (Ignored, Zeros)) or (isinstance(rule, Movement) and rule.source is not node)

    def _demand(self, node: Node, axis: AxisType) -> None:
        """Let ``node`` carry ``axis``, together with what it carries already.

        Raises:
            Barrier: it cannot carry the axis.
            _Restart: it cannot carry both.
        """
        if node in self.kept:
            raise Barrier(self.kept[node])
        sizes = shape(node)
        if any(d >= len(sizes) or sizes[d] != size for d, size in zip(axis.layout.dims, axis.layout.sizes)):
            raise Barrier(f"{node.name} has no axis that could hold {axis.layout}")
        if not is_float(node):
            raise Barrier(f"{node.name} holds no floating-point values of 16 bits or more")
        if axis.pending is not None and not all(
            _fits(moved, axis.layout) for moved in (axis.pending.scale, axis.pending.shift)
        ):
            raise Barrier("a scale per channel of several vectors is rearranged")
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

    def _assuming(self, assumptions: dict[Node, str], node: Node, why: str) -> _Restart:
        """Note that a node stays as it is, unless the walk goes on under an assumption that is known to be wrong."""
        if not self._stale:
            assumptions[node] = why
        return _Restart()

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

    # -- towards the producers -----------------------------------------------------------------------------------------

    def _backward(self, node: Node, axis: AxisType) -> None:
        if node in self._computed:
            return
        try:
            self._produce(node, axis)
        except (Barrier, LayoutError) as error:
            if self.editor.is_computable(node):
                if not self._stale:
                    self._computed.add(node)
                raise _Restart from None
            if self.editor.is_weight(node):
                raise self._assuming(self.kept, node, str(error)) from None
            if axis.pending is not None:
                return self._leave_zone(axis, str(error))
            self._entries[node, axis.layout.dims] = str(error)

    def _produce(self, node: Node, axis: AxisType) -> None:
        if node.op == "placeholder":
            return self._placeholder(node, axis)
        for here in (node, node.args[0] if op_name(node) == "getitem" else node):
            if here in self._closed:
                raise Barrier(self._closed[here])  # type: ignore[index]
        rule = self._rule(node)
        match rule:
            case Movement():
                self._demand(rule.source, replace(axis, layout=rule.backward(axis.layout)))
            case Multilinear():
                self._produce_product(node, rule, axis)
            case Concatenate():
                for source, part in self._pieces(node, rule, axis.layout):
                    self._demand(source, replace(axis, layout=part))
            case Centring() if node not in self._uncrossed and self._is_whole(rule.source, axis.layout):
                self._centrings[node] = None
                self._demand(rule.source, AxisType(axis.layout, axis.pending))
            case Normalization():
                self._produce_norm(node, rule, axis)
            case Zeros():
                pass
            case _:
                raise Barrier(_reason(rule, node))

    def _placeholder(self, node: Node, axis: AxisType) -> None:
        if self.editor.is_constant(node):
            return
        what = "a buffer that the program updates" if node in self.editor.mutated_buffers else "a program input"
        if node not in self.cache or axis.pending is not None or not axis.layout.is_contiguous:
            raise Barrier(what)
        self._carried[node, None] = axis.layout
        for _, kind, target, output in self.editor.output_values():
            if kind == OutputKind.BUFFER_MUTATION and target == self.editor.fqn(node):
                self._demand(output, axis)

    def _produce_product(self, node: Node, rule: Multilinear, axis: AxisType) -> None:
        mixing = {rule.out[d] for d in axis.layout.mixing}
        if axis.pending is not None and axis.pending.after and not _commutes_with_scale(node, rule, mixing, axis):
            if axis.pending.shift is not None and axis.pending.shift in node.all_input_nodes:
                shifted = next(n for n in node.all_input_nodes if n is not axis.pending.shift)
                self._scales[node] = None
                self._demand(shifted, replace(axis, pending=replace(axis.pending, shift=None)))
                return
            crossed = self._crossable(node, rule, axis.layout)
            if crossed is None or crossed[1] is not axis.pending.scale or axis.pending.shift is not None:
                raise Barrier("the weight is read under different scales")
            self._scales[node] = None
            self._demand(crossed[0], AxisType(axis.layout, None, axis.centred))
            return
        try:
            self._spread(rule, None, axis)
        except Barrier:
            crossed = self._crossable(node, rule, axis.layout)
            if crossed is None or axis.pending is not None or crossed[0] in self.types or self.editor.is_constant(node):
                raise
            self._scales[node] = None
            self._demand(crossed[0], AxisType(axis.layout, Pending(False, crossed[1], origin=node), axis.centred))

    def _produce_norm(self, node: Node, rule: Normalization, axis: AxisType) -> None:
        natural = self._pending_behind(rule)
        if node in self._uncrossed or axis.pending != natural or not self._is_normed(node, rule, axis.layout):
            raise Barrier("a norm with a scale per channel")
        self._cross_norm(node, rule)
        self._demand(rule.source, AxisType(axis.layout))

    # -- towards the users ---------------------------------------------------------------------------------------------

    def _forward(self, node: Node, axis: AxisType, user: Node) -> None:
        try:
            self._consume(node, axis, user)
        except (Barrier, LayoutError) as error:
            if self.editor.is_weight(node):
                raise self._assuming(self.kept, node, f"{user.name} needs it as it is: {error}") from None
            if axis.pending is not None:
                return self._leave_zone(axis, f"{user.name} reads it: {error}")
            self._exits[node, user, axis.layout.dims] = (axis, str(error))
            rule = self._rule_or_none(user)
            if not (isinstance(rule, Normalization) and rule.centres and self._is_whole(user, axis.layout)):
                self._note_uncentred(node, axis, f"is read by {user.name} in the original basis")

    def _rule_or_none(self, node: Node) -> Rule | None:
        """Return the rule of an operator, and None for a node that is none."""
        return self._rule(node) if node.op == "call_function" else None

    def _note_uncentred(self, node: Node, axis: AxisType, why: str) -> None:
        """Note a use of the stream that would see it being centred."""
        if not axis.centred and not self.editor.is_weight(node):
            self._uncentred_uses.append((node, why))

    def _consume(self, node: Node, axis: AxisType, user: Node) -> None:
        if user.op == "output":
            return self._leave_program(node, axis)
        if user in self._closed:
            raise Barrier(self._closed[user])
        rule = self._rule(user)
        match rule:
            case Movement():
                if rule.source is node:
                    layout = rule.forward(axis.layout)
                    if layout is not None:
                        self._demand(user, replace(axis, layout=layout))
            case Multilinear():
                self._consume_product(node, axis, user, rule)
            case Concatenate():
                self._consume_cat(node, axis, user, rule)
            case Square():
                self._consume_square(node, axis, user)
            case VectorNorm():
                self._need_plain(axis, "a norm is taken of it")
                if not axis.layout.mixing <= set(rule.dims):
                    raise Barrier("a norm over another axis")
                self._note_uncentred(node, axis, "is normed without centring")
            case Mean():
                self._consume_mean(node, axis, user)
            case Centring():
                self._consume_centring(node, axis, user, rule)
            case Normalization():
                self._consume_norm(node, axis, user, rule)
            case Several():
                self._consume_items(node, axis, user)
            case Ignored() | Zeros():
                pass
            case _:
                raise Barrier(_reason(rule, user))

    def _consume_items(self, node: Node, axis: AxisType, user: Node) -> None:
        """Follow all results of a split or none of them: a value cannot be restored for one of them alone."""
        for item in list(user.users):
            self._by = item
            try:
                self._consume(node, axis, item)
            except (Barrier, LayoutError) as error:
                raise self._assuming(self._closed, user, str(error)) from None

    def _leave_program(self, node: Node, axis: AxisType) -> None:
        self._need_plain(axis, "it is a program output")
        for index, kind, target, output in self.editor.output_values():
            if output is not node:
                continue
            if kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                updated = self.editor.mutated(kind, target)
                if updated not in self.cache:
                    raise Barrier("state that the program updates")
                self._demand(updated, axis)
            elif self._is_cache(node) and axis.layout.is_contiguous:
                self._carried[node, index] = axis.layout
            else:
                raise Barrier("a program output")
            self._note_uncentred(node, axis, "is a program output")

    def _is_cache(self, node: Node) -> bool:
        """Return whether the node is one of the values that a cache may hold, or a part or arrangement of them."""
        return all(n in self.cache or self._parts(n) for n in reachable(node, self._parts))

    def _parts(self, node: Node) -> Sequence[Node]:
        """Return the values that the node puts together or moves, where a cache may not hold it as it is."""
        rule = None if node in self.cache else self._rule_or_none(node)
        return (rule.source,) if isinstance(rule, Movement) else rule.sources if isinstance(rule, Concatenate) else ()

    def _need_plain(self, axis: AxisType, why: str) -> None:
        if axis.pending is not None:
            raise Barrier(why)

    def _consume_product(self, node: Node, axis: AxisType, user: Node, rule: Multilinear) -> None:
        if node in rule.opaque:
            raise Barrier(f"{op_name(user)} uses it in another way than linearly")
        ports = [o for term in rule.terms for o in term if o.node is node]
        for port in ports:
            try:
                self._spread(rule, port, axis, user)
            except Barrier as error:
                if len(ports) > 1:
                    raise self._assuming(self._closed, user, str(error)) from None
                if not self._cross_forward(node, axis, user, rule):
                    raise Barrier(self._uncrossed.get(user, str(error))) from error

    def _cross_forward(self, node: Node, axis: AxisType, user: Node, rule: Multilinear) -> bool:
        """x̂ -> x̂·g,  or  x̂·g -> x̂·g + β:  move the scale or shift into the linears that follow, if that is possible."""
        if self.editor.is_constant(node) or self.editor.is_constant(user):
            return False
        if axis.pending is not None and not axis.pending.after:
            return axis.pending.origin is user
        crossed = self._crossable(user, rule, axis.layout)
        if crossed is None or crossed[0] is not node:
            return False
        if axis.pending is not None:
            return False
        self._scales[user] = None
        self._demand(user, AxisType(axis.layout, Pending(True, crossed[1], origin=user), axis.centred))
        return True

    def _crossable(self, node: Node, rule: Rule, layout: Layout) -> tuple[Node, Node] | None:
        """Return (value, constant) where ``node`` multiplies a value by one constant per coordinate of the space.

        Return None for other nodes, and where the constant cannot be moved.
        """
        if node in self._uncrossed or not isinstance(rule, Multilinear) or not layout.is_contiguous:
            return None
        if len(rule.terms) != 1 or len(rule.terms[0]) != 2 or rule.opaque:
            return None
        a, b = rule.terms[0]
        if self.editor.is_constant(a.node):
            a, b = b, a
        if self.editor.is_constant(a.node) or not self.editor.is_computable(b.node):
            return None
        if any(d >= len(rule.out) for d in layout.dims):
            return None
        carriers = {rule.out[d] for d in layout.dims}
        if carriers - set(a.labels) or {label for label in b.labels if label is not None} != carriers:
            return None
        return (a.node, self.editor.canonical(b.node)) if len(layout.dims) == 1 else None

    def _consume_cat(self, node: Node, axis: AxisType, user: Node, rule: Concatenate) -> None:
        if axis.pending is not None:
            raise Barrier("it is concatenated with other values")
        if rule.dim not in axis.layout.dims:
            self._demand(user, axis)
            return
        offset = 0
        for source in rule.sources:
            length = shape(source)[rule.dim]
            total = shape(user)[rule.dim]
            if not isinstance(length, int) or not isinstance(total, int):
                raise Barrier("concatenated along an axis of dynamic size")
            if source is node:
                index = _range(offset, length)
                self._demand(user, replace(axis, layout=axis.layout.untaken(rule.dim, index, total)))
            offset += length

    def _pieces(self, node: Node, rule: Concatenate, layout: Layout) -> Iterator[tuple[Node, Layout]]:
        """Yield the concatenated values that hold some of the layout's blocks, each with its part of the layout."""
        offset = 0
        for source in rule.sources:
            if rule.dim not in layout.dims:
                yield source, layout
                continue
            length = shape(source)[rule.dim]
            if not isinstance(length, int):
                raise Barrier("concatenated along an axis of dynamic size")
            part = layout.taken(rule.dim, _range(offset, length), shape(node)[rule.dim])
            offset += length
            if part is not None:
                yield source, part

    def _consume_square(self, node: Node, axis: AxisType, user: Node) -> None:
        self._need_plain(axis, "its squares are summed")
        for reader in user.users:
            dims = None if isinstance(self._rule_or_none(reader), Opaque) else _reduced_axes(reader)
            if dims is None or not axis.layout.mixing <= dims:
                raise Barrier(f"{user.name} squares it channel by channel")
        self._note_uncentred(node, axis, "is squared and summed without centring")

    def _consume_mean(self, node: Node, axis: AxisType, user: Node) -> None:
        self._need_plain(axis, "its mean is taken")
        readers = _through_identities(user)
        if not readers or not all(
            isinstance(self._rule_or_none(r), Centring) and r not in self._uncrossed for r in readers
        ):
            raise Barrier("its mean over the channels is used")

    def _consume_centring(self, node: Node, axis: AxisType, user: Node, rule: Centring) -> None:
        self._need_plain(axis, "it is centred")
        if user in self._uncrossed:
            raise Barrier(self._uncrossed[user])
        if not self._is_whole(user, axis.layout):
            raise Barrier("its mean is taken over another axis")
        self._centrings[user] = None
        self._demand(user, AxisType(axis.layout, None, True))

    def _consume_norm(self, node: Node, axis: AxisType, user: Node, rule: Normalization) -> None:
        self._need_plain(axis, "a norm is taken of it")
        if node is not rule.source:
            raise Barrier("it is a norm's weight")
        if user in self._uncrossed:
            raise Barrier(self._uncrossed[user])
        if not self._is_normed(user, rule, axis.layout):
            raise Barrier("the norm is taken over another axis")
        if not rule.centres:
            self._note_uncentred(node, axis, "is normed without centring")
        pending = self._cross_norm(user, rule)
        self._demand(user, AxisType(axis.layout, pending, rule.centres or axis.centred))

    def _cross_norm(self, node: Node, rule: Normalization) -> Pending | None:
        """Note the norm, and return the scale and shift that are pending behind it; None where it has neither."""
        pending = self._pending_behind(rule, node)
        self._scales[node] = None
        if rule.centres:
            self._centrings[node] = None
        return pending

    def _pending_behind(self, rule: Normalization, origin: Node | None = None) -> Pending | None:
        """Return the scale and shift of a norm, where it has any.

        Raises:
            Barrier: they cannot be moved into constants, because only a run makes them.
        """
        if rule.weight is None and rule.bias is None:
            return None
        made = next((n for n in (rule.weight, rule.bias) if n is not None and not self.editor.is_computable(n)), None)
        if made is not None:
            raise Barrier(f"{made.name}, the norm's scale or bias, is made while the program runs")
        return Pending(True, self._canonical(rule.weight), self._canonical(rule.bias), origin=origin)

    def _canonical(self, node: Node | None) -> Node | None:
        return node if node is None else self.editor.canonical(node)

    def _is_normed(self, node: Node, rule: Normalization, layout: Layout) -> bool:
        """Return whether the norm is taken of the space's vectors.

        It is taken of one vector. Where nothing is centred it may be taken of several that lie side by side, and where
        nothing is scaled either of other values besides.
        """
        last = {len(shape(node)) - 1}
        if rule.centres:
            return self._is_whole(node, layout)
        if rule.weight is None and rule.bias is None:
            return layout.mixing <= last
        return layout.is_contiguous and layout.mixing <= last

    def _is_whole(self, node: Node, layout: Layout) -> bool:
        """Return whether the space's one vector is the whole last axis."""
        return layout.count == 1 and layout.is_contiguous and layout.dims == (len(shape(node)) - 1,)

    # -- sums of products ----------------------------------------------------------------------------------------------

    def _spread(self, rule: Multilinear, at: Operand | None, axis: AxisType, user: Node | None = None) -> None:
        """Go from one port of a product, which is its result for None, to all others that must then be in the space.

        Raises:
            Barrier: the operator does not commute with a rotation of the axis.
        """
        layout = axis.layout
        labels = rule.out if at is None else at.labels
        names = {d: labels[d] for d in layout.dims}
        if None in names.values():
            raise Barrier("the operator acts on the axis itself")
        mixing = {names[d] for d in layout.mixing}
        if mixing <= set(rule.out):
            self._pass_through(rule, at, axis, names, mixing, user)
        elif mixing & set(rule.out) or at is None or user is None:
            raise Barrier("part of the axis is summed over")
        else:
            self._contract(rule, at, axis, names, mixing, user)

    def _pass_through(
        self,
        rule: Multilinear,
        at: Operand | None,
        axis: AxisType,
        names: dict[int, object],
        mixing: set[object],
        user: Node | None,
    ) -> None:
        """Go on where every term of the product holds the axis once, and the result has it."""
        demands: list[tuple[Node, dict[int, int]]] = []
        if not set(names.values()) <= set(rule.out):
            raise Barrier("part of the axis is summed over")
        for term in rule.terms:
            holders = [o for o in term if mixing & set(o.labels)]
            if not holders:
                raise Barrier("it adds the same value to all channels")
            if len(holders) > 1:
                raise Barrier("it multiplies channel by channel")
            if not set(names.values()) <= set(holders[0].labels):
                raise Barrier("part of the axis is broadcast")
            if holders[0].node in rule.opaque:
                raise Barrier("it is used in another way than linearly")
            demands.append((holders[0].node, {d: holders[0].labels.index(n) for d, n in names.items()}))
        scaled = axis.pending is not None and axis.pending.after
        if scaled and user is not None and not _commutes_with_scale(user, rule, mixing, axis):
            if at is not None and self.editor.is_weight(at.node):
                raise self._assuming(self.kept, at.node, "its uses need different scales folded in")
            self._pass_pending(at, axis, demands, user)
            return
        if at is not None and user is not None:
            self._demand(
                user, replace(axis, layout=axis.layout.renamed({d: rule.out.index(n) for d, n in names.items()}))
            )
        for node, to in demands:
            if at is None or node is not at.node:
                reads = axis.reads and len(rule.terms) == 1
                self._demand(node, replace(axis, layout=axis.layout.renamed(to), reads=reads))

    def _pass_pending(
        self, at: Operand | None, axis: AxisType, demands: list[tuple[Node, dict[int, int]]], user: Node
    ) -> None:
        """x̂·g -> x̂·g + β:  let a shift be pending as well.

        Besides products with factors per token, that is all that may become of a value with a scale pending.
        """
        assert axis.pending is not None
        added = [node for node, _ in demands if at is None or node is not at.node]
        simple = (
            len(added) == 1
            and self.editor.is_computable(added[0])
            and op_name(user) == "aten::add"
            and arguments(user)["alpha"] == 1
        )
        if not simple or axis.pending.shift is not None or user in self._uncrossed or not axis.layout.is_contiguous:
            raise Barrier("it is combined with other values")
        if not _fits(added[0], axis.layout):
            raise Barrier("it is combined with other values")
        self._scales[user] = None
        self._demand(user, replace(axis, pending=replace(axis.pending, shift=added[0])))

    def _contract(
        self, rule: Multilinear, at: Operand, axis: AxisType, names: dict[int, object], mixing: set[object], user: Node
    ) -> None:
        """Go on to the one operand that the product contracts the axis with."""
        term = next(t for t in rule.terms if any(o is at for o in t))
        partners = [o for o in term if o is not at and mixing & set(o.labels)]
        if len(partners) != 1:
            raise Barrier("it sums over the axis")
        partner = partners[0]
        if not set(names.values()) <= set(partner.labels):
            raise Barrier("part of the axis is broadcast")
        layout = axis.layout.renamed({d: partner.labels.index(n) for d, n in names.items()})
        constant = self.editor.is_weight(partner.node)
        if axis.pending is not None and not axis.pending.after:
            raise Barrier("it is contracted before its scale")
        if not constant and self.editor.is_weight(at.node):
            self._check_partner(at.node, partner.node, axis)
        if axis.pending is not None and not constant and not self.editor.is_weight(at.node):
            raise Barrier("two computed values are contracted")
        if axis.pending is not None and not constant:
            self._same_scale.append((at.node, partner.node, axis.pending.scale))
            return
        if axis.pending is not None and axis.pending.shift is not None and axis.layout.count != 1:
            raise Barrier("the norm's bias would be read by several vectors at once")
        self._note_uncentred(at.node, axis, f"is read by {user.name}")
        self._demand(
            partner.node,
            AxisType(
                layout,
                axis.pending if axis.pending is None else replace(axis.pending, shift=None),
                axis.centred or constant or self.editor.is_weight(at.node),
                reads=constant,
            ),
        )
        if axis.pending is not None and axis.pending.shift is not None and constant:
            self._shift_reader(user, at, partner, axis.pending.shift)

    def _check_partner(self, constant: Node, partner: Node, axis: AxisType) -> None:
        """Make sure that a second use of a constant reads a value with the same scale pending.

        Raises:
            _Restart: it does not, and the constant is kept.
        """
        if partner in self.types:
            return
        root = partner
        while (source := self._only_source(root)) is not None:
            root = source
        rule = self._rule(root) if root.op == "call_function" else Opaque("")
        natural = self._canonical(rule.weight) if isinstance(rule, Normalization) else None
        if natural is None and isinstance(rule, Multilinear):
            rank = len(shape(root))
            crossed = (
                self._crossable(root, rule, Layout.full(rank - 1, axis.layout.width))
                if axis.layout.count == 1
                else None
            )
            natural = None if crossed is None else crossed[1]
        expected = None if axis.pending is None else axis.pending.scale
        if root not in self._uncrossed and natural is not expected:
            raise self._assuming(self.kept, constant, "its uses need different scales folded in")

    def _only_source(self, node: Node) -> Node | None:
        """Return the value that a movement or a multiplication by a scalar was applied to; None for other operators."""
        rule = self._rule_or_none(node)
        if isinstance(rule, Movement):
            return rule.source
        if isinstance(rule, Multilinear) and len(rule.terms) == 1:
            operands = [o for o in rule.terms[0] if any(label is not None for label in o.labels)]
            return operands[0].node if len(operands) == 1 else None
        return None

    def _shift_reader(self, user: Node, at: Operand, partner: Operand, shift: Node) -> None:
        """Note that the result of ``user`` must gain the shift times its weight.

        Raises:
            Barrier: the operator has no place for that.
        """
        args = arguments(user)
        unscaled = args.get("alpha", 1) == 1 and args.get("beta", 1) == 1
        on_the_right = op_name(user) == "aten::linear" or (partner.labels == ("k", "n") and at.labels[-1] == "k")
        bias = args.get("bias") if op_name(user) == "aten::linear" else args["self"] if "beta" in args else None
        one_for_all = bias is None or (self.editor.is_computable(bias) and shape(bias) == shape(user)[-1:])
        if (
            op_name(user) not in _BIASED
            or len(shape(partner.node)) != 2
            or not (unscaled and on_the_right and one_for_all)
            or not self.editor.is_computable(partner.node)
        ):
            raise Barrier(f"{op_name(user)} has no place for the norm's bias")
        self._shifts[user, at.node] = ShiftUse(user, at.node, partner.node, shift)

    # -- the result ----------------------------------------------------------------------------------------------------

    def _result(self, seed: Node, layout: Layout) -> Space:
        entered = {node for node, _ in self._entries}
        constants = [
            ConstantUse(n, t)
            for n, types in self.types.items()
            for t in types
            if n in self._computed or (self.editor.is_stored(n) and n not in entered)  # updated buffers can be entries
        ]
        exits: dict[tuple[Node, tuple[int, ...]], tuple[AxisType, str, list[Node]]] = {}
        kept: dict[tuple[Node, tuple[int, ...]], list[Node]] = {}
        for (node, user, dims), (axis, why) in self._exits.items():
            if node in entered:
                kept.setdefault((node, dims), []).append(user)
            else:
                exits.setdefault((node, dims), (axis, why, []))[2].append(user)
        space = Space(
            seed=seed,
            width=layout.width,
            members={n: tuple(t) for n, t in self.types.items()},
            constants=tuple(constants),
            entries=tuple(
                Entry(node, self._layout_of(node, dims), tuple(kept.get((node, dims), ())), why, bool(self._centrings))
                for (node, dims), why in self._entries.items()
            ),
            exits=tuple(Exit(node, axis.layout, tuple(users), why) for (node, _), (axis, why, users) in exits.items()),
            carried=tuple(CacheEdge(n, at, i) for (n, i), at in self._carried.items()),
            scales=tuple(self._scales),
            shifts=tuple(self._shifts.values()),
            centrings=tuple(self._centrings),
            centred=bool(self._centrings),
            kept=dict(self.kept),
        )
        return settled(space, self._rule)

    def _layout_of(self, node: Node, dims: tuple[int, ...]) -> Layout:
        return next(t.layout for t in self.types[node] if set(t.layout.dims) & set(dims))


def _reason(rule: Rule, node: Node) -> str:
    return rule.why if isinstance(rule, Opaque) else f"{op_name(node)} does not commute with a rotation"


def _fits(scale: Node | None, layout: Layout) -> bool:
    """Return whether there is one scale for every vector of the layout, or one for all of them side by side."""
    if scale is None:
        return True
    if not all(isinstance(size, int) for size in shape(scale)):
        return False
    count = elements(scale)
    return count == layout.width or (count == layout.width * layout.count and layout.is_contiguous)


def _commutes_with_scale(node: Node, rule: Multilinear, mixing: set[Any], axis: AxisType) -> bool:
    """f(x̂)·g = f(x̂·g):  return whether the operator is linear in one operand, channel by channel.

    Such are a factor per token, a gather of tokens and a sum over them. A shift as well commutes with gathers alone.
    """
    holders = [o for term in rule.terms for o in term if mixing & set(o.labels)]
    if len(rule.terms) != 1 or len(holders) != 1 or axis.pending is None:
        return False
    return axis.pending.shift is None or op_name(node) in _SELECTIONS


def _range(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length)


def _through_identities(node: Node) -> list[Node]:
    """Return the users of a value, casts and checks looked through."""
    found: list[Node] = []
    for user in node.users:
        rule = rule_of(user) if user.op == "call_function" else None
        if isinstance(rule, Ignored):
            continue
        if isinstance(rule, Movement) and rule.is_identity:
            found += _through_identities(user)
        else:
            found.append(user)
    return found


def _reduced_axes(node: Node) -> frozenset[int] | None:
    """Return the axes that a sum or mean runs over, and None for other operators."""
    if not is_op(node) or op_name(node) not in ("aten::mean", "aten::sum"):
        return None
    args = arguments(node)
    rank, dims = len(shape(args["self"])), args.get("dim")
    if dims is None or dims == []:
        return frozenset(range(rank))
    return frozenset(d % rank for d in ([dims] if isinstance(dims, int) else dims))


_SELECTIONS = {"aten::index", "aten::index_select", "aten::gather", "aten::roll"}
_BIASED = {"aten::linear", "aten::mm", "aten::addmm", "aten::matmul"}

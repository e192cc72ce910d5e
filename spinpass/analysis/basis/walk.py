"""The basis analysis: which tensor axes must share one basis.

A *space* grows from a seed axis through every operator that commutes with a rotation of that axis, in both directions,
until each of its edges is accounted for: constants that lie in the space (they fold), contractions (they cancel), norm
statistics (they do not change), and barriers. Where a value enters the space behind a barrier stands an
:class:`~.space.Entry`, where one leaves it for an operator that needs the original basis an :class:`~.space.Exit`.
There an online rotation makes the program right, whatever the configuration then decides. The analysis reads the graph
and never edits it; ``ops/table.py`` says what each operator does.

What happens at sums of products is in ``products.py``, at norms in ``norms.py``, and where demands contradict in
``growth.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from spinpass.errors import InvariantError
from spinpass.graph import Layout, LayoutError, op_name, reachable, shape

from ..ops.rules import (
    Centring,
    Concatenate,
    Ignored,
    Mean,
    Movement,
    Multilinear,
    Normalization,
    Opaque,
    Rule,
    Several,
    Square,
    VectorNorm,
    Zeros,
)
from .entries import settled
from .growth import Barrier, Restart
from .norms import NormGrowth
from .space import AxisType, CacheEdge, ConstantUse, Entry, Exit, Space


class Walk(NormGrowth):
    """The growth of a space from a seed."""

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
            except Restart:
                continue
        raise InvariantError(f"the walk from {seed.name} does not settle")

    def _grow_once(self, seed: Node, layout: Layout) -> Space:
        """Grow the space under the assumptions so far.

        Raises:
            Restart: one of them is wrong.
        """
        self._begin(seed)
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
            raise Restart
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
            raise Restart
        self._check_exits()
        return self._result(seed, layout)

    def _check_exits(self) -> None:
        """Close operators whose results would leave the space where no rotation can stand: operands leave instead.

        Raises:
            Restart: there are such.
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
            raise Restart

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

    def _backward(self, node: Node, axis: AxisType) -> None:
        if node in self._computed:
            return
        try:
            self._produce(node, axis)
        except (Barrier, LayoutError) as error:
            if self.editor.is_computable(node):
                if not self._stale:
                    self._computed.add(node)
                raise Restart from None
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
                for source, part in _pieces(node, rule, axis.layout):
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
        if node not in self.cache or axis.pending is not None or not self._may_be_carried(axis.layout):
            raise Barrier(what)
        self._carried[node, None] = axis.layout
        for _, kind, target, output in self.editor.output_values():
            if kind == OutputKind.BUFFER_MUTATION and target == self.editor.fqn(node):
                self._demand(output, axis)

    def _forward(self, node: Node, axis: AxisType, user: Node) -> None:
        try:
            self._consume(node, axis, user)
        except (Barrier, LayoutError) as error:
            if self.editor.is_weight(node):
                raise self._assuming(self.kept, node, f"{user.name} needs it as it is: {error}") from None
            if axis.pending is not None:
                return self._leave_zone(axis, f"{user.name} reads it: {error}")
            self._exits[node, user, axis.layout.dims] = (axis, str(error))
            if not self._centres_itself(user, axis.layout):
                self._note_uncentred(node, axis, f"is read by {user.name} in the original basis")

    def _centres_itself(self, user: Node, layout: Layout) -> bool:
        """Return whether the operator takes the mean off the space's vectors, so that it does not see them centred."""
        rule = self._rule_or_none(user)
        if isinstance(rule, Several):
            return bool(user.users) and all(self._centres_itself(item, layout) for item in user.users)
        return isinstance(rule, Normalization) and rule.centres and self._is_whole(user, layout)

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
            elif self._is_cache(node) and self._may_be_carried(axis.layout):
                self._carried[node, index] = axis.layout
            else:
                raise Barrier("a program output")
            self._note_uncentred(node, axis, "is a program output")

    def _may_be_carried(self, layout: Layout) -> bool:
        """Return whether a cache may leave the program with the space's vectors where the layout says."""
        return layout.is_contiguous

    def _is_cache(self, node: Node) -> bool:
        """Return whether the node is one of the values that a cache may hold, or a part or arrangement of them."""
        return all(n in self.cache or self._parts(n) for n in reachable(node, self._parts))

    def _parts(self, node: Node) -> Sequence[Node]:
        """Return the values that the node puts together or moves, where a cache may not hold it as it is."""
        rule = None if node in self.cache else self._rule_or_none(node)
        return (rule.source,) if isinstance(rule, Movement) else rule.sources if isinstance(rule, Concatenate) else ()

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
                Entry(
                    node,
                    axis.layout,
                    tuple(kept.get((node, dims), ())),
                    why,
                    bool(self._centrings) and not axis.centred,
                )
                for (node, dims), why in self._entries.items()
                for axis in [self._type_of(node, dims)]
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

    def _type_of(self, node: Node, dims: tuple[int, ...]) -> AxisType:
        return next(t for t in self.types[node] if set(t.layout.dims) & set(dims))


def _pieces(node: Node, rule: Concatenate, layout: Layout) -> Iterator[tuple[Node, Layout]]:
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


def _reason(rule: Rule, node: Node) -> str:
    return rule.why if isinstance(rule, Opaque) else f"{op_name(node)} does not commute with a rotation"


def _range(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length, device="cpu")

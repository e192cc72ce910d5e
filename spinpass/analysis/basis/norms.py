"""The walk through statistics: squares that are summed, means that are subtracted, and norms as one operator."""

from __future__ import annotations

from torch.fx import Node

from spinpass.graph import Layout, is_op, op_name, shape

from ..ops.calls import Call
from ..ops.rules import Centring, Ignored, Movement, Normalization, Opaque
from ..ops.table import rule_of
from .growth import Barrier
from .products import ProductGrowth
from .space import AxisType, Pending


class NormGrowth(ProductGrowth):
    """The walk's way through norms and what they are made of."""

    def _produce_norm(self, node: Node, rule: Normalization, axis: AxisType) -> None:
        natural = self._pending_behind(rule)
        if node in self._uncrossed or axis.pending != natural or not self._is_normed(node, rule, axis.layout):
            raise Barrier("a norm with a scale per channel")
        self._cross_norm(node, rule)
        self._demand(rule.source, AxisType(axis.layout))

    def _is_centred(self, node: Node, axis: AxisType) -> bool:
        """A LayerNorm's result is, before the scale and shift that are pending behind it."""
        rule = None if node in self._uncrossed or node in self._closed else self._rule_or_none(node)
        if not isinstance(rule, Normalization) or not rule.centres or not self._is_whole(node, axis.layout):
            return False
        return rule.weight is None and rule.bias is None and axis.pending is None

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
    call = Call(node)
    return frozenset(call.axes("dim", len(shape(call["self"]))))

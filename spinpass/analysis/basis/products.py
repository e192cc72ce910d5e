"""The walk through sums of products: what passes an axis on, what contracts it, and how scales are crossed.

x̂ · g (+ β) -> W    a norm's scale, if all that follows are linears:     x̂ -> W·diag(g), b + β Wᵀ
y = W x,  y · c     a per-channel scale on a writer alone:                y = diag(c)·W x
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from spinpass.graph import Layout, arguments, op_name, shape

from ..ops.rules import Movement, Multilinear, Normalization, Opaque, Operand, Rule
from .growth import Barrier, Growth, fits
from .space import AxisType, Pending, ShiftUse


class ProductGrowth(Growth):
    """The walk's way through sums of products."""

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
        if not fits(added[0], axis.layout):
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
            Restart: it does not, and the constant is kept.
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


def _commutes_with_scale(node: Node, rule: Multilinear, mixing: set[Any], axis: AxisType) -> bool:
    """f(x̂)·g = f(x̂·g):  return whether the operator is linear in one operand, channel by channel.

    Such are a factor per token, a gather of tokens and a sum over them. A shift as well commutes with gathers alone.
    """
    holders = [o for term in rule.terms for o in term if mixing & set(o.labels)]
    if len(rule.terms) != 1 or len(holders) != 1 or axis.pending is None:
        return False
    return axis.pending.shift is None or op_name(node) in _SELECTIONS


_SELECTIONS = {"aten::index", "aten::index_select", "aten::gather", "aten::roll"}
_BIASED = {"aten::linear", "aten::mm", "aten::addmm", "aten::matmul"}

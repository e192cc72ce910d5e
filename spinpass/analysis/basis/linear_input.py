"""The space between a value and the linear layers that read it: R1's online form, and any other input of linears.

    y = z Wᵀ   ->   y = (z R)(W R)ᵀ

All its linears share one rotation of z, and whoever else reads z keeps the original.
"""

from __future__ import annotations

from torch.fx import Node

from spinpass.graph import is_float, op_name, reachable

from ..ops.rules import Ignored, Movement, Multilinear, Rule, Zeros
from ..patterns.linear import as_linear
from .growth import Barrier, Restart
from .space import AxisType
from .walk import Walk


class LinearInputWalk(Walk):
    """A walk from a computed value towards the linears that read it, and never further. Its seeds are entries."""

    def _backward(self, node: Node, axis: AxisType) -> None:
        if self.editor.is_weight(node):
            return super()._backward(node, axis)
        source = _passed_on(self._rule(node)) if node.op == "call_function" else None
        if source is None or source not in self.types or node is self._seed:
            self._entries[node, axis.layout.dims] = "rotated online, at the input of the linears"

    def _forward(self, node: Node, axis: AxisType, user: Node) -> None:
        if self.editor.is_weight(node):
            if not self.editor.is_weight(user) and not self._is_linear_weight(node, axis, user):
                lookup = op_name(user) == "aten::embedding"
                other = "the table of a lookup, too: tied='untie' parts them" if lookup else f"read by {user.name}, too"
                self.kept[node] = f"the weight of the layer behind it is {other}"
                raise Restart
            return super()._forward(node, axis, user)
        if user.op == "call_function" and isinstance(self._rule(user), (Ignored, Zeros)):
            return
        if not self._serves(user, node):
            self._exits[node, user, axis.layout.dims] = (axis, "it keeps the original")
            return
        super()._forward(node, axis, user)

    def _serves(self, user: Node, node: Node) -> bool:
        """Return whether everything behind ``user`` is a linear layer whose weight may be rotated."""
        if user.op != "call_function":
            return False
        rule = self._rule(user)
        if isinstance(rule, Movement) and rule.source is not node:
            return True
        if isinstance(rule, Movement) or _selects(user):
            return bool(user.users) and all(
                self._serves(u, user)
                for u in user.users
                if not (u.op == "call_function" and isinstance(self._rule(u), (Ignored, Zeros)))
            )
        linear = as_linear(self.editor, user)
        return linear is not None and linear.operand is node and not self._is_kept(linear.weight)

    def _is_kept(self, weight: Node) -> bool:
        weights = reachable(weight, lambda n: filter(self.editor.is_weight, n.all_input_nodes))
        return any(n in self.kept for n in weights)

    def _is_linear_weight(self, node: Node, axis: AxisType, user: Node) -> bool:
        """Return whether ``user`` contracts the axis of the weight and does not pass it on."""
        linear = as_linear(self.editor, user)
        if linear is None or linear.weight is not node or axis.layout.dims != (linear.weight_dim,):
            return False
        rule = self._rule(user)
        return isinstance(rule, Multilinear) and not any(
            o.node is node for term in rule.terms for o in term if len(term) == 1
        )

    def _check_partner(self, constant: Node, partner: Node, axis: AxisType) -> None:
        """Do nothing: whatever else a weight reads is rotated where it reads it, its scale included."""

    def _leave_program(self, node: Node, axis: AxisType) -> None:
        raise Barrier("a program output")


def _selects(node: Node) -> bool:
    """Return whether the node takes some of its operand's tokens, each whole (those that are routed to an expert)."""
    return op_name(node) in ("aten::index", "aten::index_select") and is_float(node)


def _passed_on(rule: Rule) -> Node | None:
    """Return the value whose vectors an operator passes on unchanged, or None for other operators."""
    if isinstance(rule, Movement):
        return rule.source
    if isinstance(rule, Multilinear) and len(rule.terms) == 1 and len(rule.terms[0]) == 1:
        return rule.terms[0][0].node
    return None

"""CollectAffine:  f(x)  ->  x·G + B,   where f is made of products and sums with constants for each channel.

    x / g  ->  x·(1/g)      x + x·g  ->  x·(1 + g)      (x·g + b)·h  ->  x·gh + b·h      b − x·g  ->  x·(−g) + b
    a batch norm that does not train  ->  (x − mean)·G + B      x·(r·g)  ->  (x·r)·g,   r one number for each vector

A scale is taken past a shift behind norms alone: elsewhere x·gh and b·h may be large and nearly cancel.
What many operators of torch can say is said in one way, the one that the analysis knows scales and shifts by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from spinpass.analysis import Movement, Normalization, Zeros, rule_of
from spinpass.graph import ProgramEditor, arguments, is_float, is_op, op_name, shape, value

_aten = torch.ops.aten
_ORIGIN = "CollectAffine"

_Number = Node | float
"""A constant node with one number for each channel, or one number for all."""


@dataclass(frozen=True)
class Affine:
    """What a value is: ``root`` times ``scale`` plus ``shift``; a constant where there is no root."""

    root: Node | None
    scale: _Number = 1.0
    shift: _Number = 0.0


def collect_affine(editor: ProgramEditor) -> None:
    """Let every chain of products and sums with constants for each channel be one scale and one shift."""
    collected = _Collected(editor)
    for node in list(editor.nodes):
        operator = node.args[0] if op_name(node) == "getitem" and node.args[1] == 0 else node
        known = isinstance(operator, Node) and is_op(operator) and op_name(operator) in _FORMS
        if known and is_float(node) and not editor.is_constant(node):
            collected.see(node, operator)  # type: ignore[arg-type]


class _Collected:
    def __init__(self, editor: ProgramEditor) -> None:
        self._editor = editor
        self._forms: dict[Node, Affine] = {}
        self._at: Node  # the node that is looked at, in whose dtype new ones are made
        self._last: Node  # the one behind which the next is made

    def see(self, node: Node, operator: Node) -> None:
        """Note what the result of an operator is, or put in its place the scale and shift that it is."""
        self._at = self._last = node
        form = _FORMS[op_name(operator)](self, arguments(operator))
        if form is None or form.root is None:
            return
        if not isinstance(form.scale, Node):
            if isinstance(form.shift, Node) and _is_normed(form.root):
                self._forms[node] = form
            return
        if not self._is_collected(node, form):
            made = self._built(form)
            if shape(made) != shape(node) or value(made).dtype != value(node).dtype:
                return
            self._editor.replace(node, made)
            node = made
        self._forms[node] = form

    def of(self, argument: Any) -> Affine | None:
        """Return what an operand is; None for constants of more than a number for each channel, and for
        values of another dtype."""
        if isinstance(argument, (int, float)):
            return Affine(None, shift=float(argument))
        if not isinstance(argument, Node) or not is_float(argument):
            return None
        dtype = value(self._at).dtype
        if is_op(argument) and isinstance(rule_of(argument), Zeros):
            return Affine(None)
        if not self._editor.is_constant(argument):
            return self._forms.get(argument, Affine(argument)) if value(argument).dtype == dtype else None
        if _channel_axis(argument) is None:
            return None
        cast = argument if value(argument).dtype == dtype else self._make(_aten.to.dtype, argument, dtype)
        return Affine(None, shift=cast)

    def plus(self, p: Affine | None, q: Affine | None) -> Affine | None:
        """Return the sum of two forms; None where they are of different values."""
        if p is None or q is None:
            return None
        if p.root is None or q.root is None:
            rooted = q if p.root is None else p
            return Affine(rooted.root, rooted.scale, self._sum(p.shift, q.shift))
        if p.root is q.root:
            return Affine(p.root, self._sum(p.scale, q.scale), self._sum(p.shift, q.shift))
        if isinstance(p.scale, Node) and p.scale is q.scale and (_is_token(p.root) or _is_token(q.root)):
            root = self._make(_aten.add.Tensor, p.root, q.root)
            return Affine(root, p.scale, self._sum(p.shift, q.shift))
        return None

    def times(self, p: Affine | None, q: Affine | None) -> Affine | None:
        """Return the product of two forms; None where it is not linear in one value."""
        if p is None or q is None:
            return None
        if p.root is None:
            p, q = q, p
        if q.root is None:
            apart = p.shift != 0.0 and p.root is not None and isinstance(q.shift, Node)
            if apart and not _is_normed(p.root):
                return None
            return Affine(p.root, self._product(p.scale, q.shift), self._product(p.shift, q.shift))
        token = _is_token(p.root) or _is_token(q.root)
        scaled = isinstance(p.scale, Node) or isinstance(q.scale, Node)
        narrow = value(self._at).dtype == torch.float16  # whatever is large before it is scaled overflows
        if p.root is None or narrow or not token or not scaled or p.shift != 0.0 or q.shift != 0.0:
            return None
        return Affine(self._make(_aten.mul.Tensor, p.root, q.root), self._product(p.scale, q.scale))

    def scaled(self, p: Affine | None, by: Any) -> Affine | None:
        """Return the form times a number; None where only a run tells it."""
        if not isinstance(by, (int, float)):
            return None
        return p if by == 1 else self.times(p, Affine(None, shift=float(by)))

    def minus(self, p: Affine | None, q: Affine | None, by: Any) -> Affine | None:
        """Return p − by·q."""
        return self.plus(p, self.scaled(self.scaled(q, by), -1))

    def inverse(self, argument: Any) -> Affine | None:
        """Return one over a constant; None for other values, and where it would be rounded to 8 or 11 bits."""
        form = self.of(argument)
        if form is None or form.root is not None or value(self._at).dtype not in (torch.float32, torch.float64):
            return None
        if isinstance(form.shift, Node):
            return Affine(None, shift=self._make(_aten.reciprocal.default, form.shift))
        return Affine(None, shift=1 / form.shift) if form.shift else None

    def normed(self, args: dict[str, Any]) -> Affine | None:
        """(x − mean)·rsqrt(variance + ε)·w + b:  return what a batch norm computes that does not train."""
        given = [args["running_mean"], args["running_var"], args["weight"], args["bias"]]
        known = [each for each in given if each is not None]
        if args.get("training") or None in given[:2] or not all(self._editor.is_constant(each) for each in known):
            return None
        if any(value(each).dtype != value(self._at).dtype for each in known):
            return None  # its statistics are wider than its values
        after = len(shape(args["input"])) - 2
        mean, variance = (self._along(each, after) for each in given[:2])
        weight, bias = (None if each is None else self._along(each, after) for each in given[2:])
        root = self._make(_aten.rsqrt.default, self._make(_aten.add.Tensor, variance, args["eps"]))
        scale = Affine(None, shift=root if weight is None else self._product(root, weight))
        centred = Affine(self._make(_aten.sub.Tensor, args["input"], mean))
        return self.plus(self.times(centred, scale), Affine(None, shift=0.0 if bias is None else bias))

    def _along(self, constant: Node, after: int) -> Node:
        """Return a constant of one axis with as many axes behind."""
        return self._make(_aten.view.default, constant, [-1, *[1] * after]) if after else constant

    def _sum(self, a: _Number, b: _Number) -> _Number:
        if isinstance(a, Node) or isinstance(b, Node):
            node, other = (a, b) if isinstance(a, Node) else (b, a)
            return node if other == 0.0 else self._make(_aten.add.Tensor, node, other)
        return a + b

    def _product(self, a: _Number, b: _Number) -> _Number:
        if isinstance(a, Node) or isinstance(b, Node):
            node, other = (a, b) if isinstance(a, Node) else (b, a)
            return 0.0 if other == 0.0 else node if other == 1.0 else self._make(_aten.mul.Tensor, node, other)
        return a * b

    def _is_collected(self, node: Node, form: Affine) -> bool:
        """Return whether the node is the scale and shift of its root as they are to be written."""
        operands = node.all_input_nodes
        if form.shift == 0.0:
            return op_name(node) == "aten::mul" and set(operands) == {form.root, form.scale}
        if op_name(node) != "aten::add" or arguments(node)["alpha"] != 1 or form.shift not in operands:
            return False
        scaled = next((n for n in operands if n is not form.shift), None)
        return scaled is not None and self._forms.get(scaled) == Affine(form.root, form.scale)

    def _built(self, form: Affine) -> Node:
        """Return root · scale + shift, a shift that is one number written out for each channel."""
        made = self._make(_aten.mul.Tensor, form.root, form.scale)
        self._forms[made] = Affine(form.root, form.scale)
        shift = form.shift
        if shift == 0.0:
            return made
        if not isinstance(shift, Node):
            shift = self._make(_aten.full_like.default, form.scale, shift)
        return self._make(_aten.add.Tensor, made, shift)

    def _make(self, target: Any, *args: Any) -> Node:
        self._last = self._editor.call(target, *args, after=self._last, origin=_ORIGIN)
        return self._last


def _channel_axis(constant: Node) -> int | None:
    """Return the one axis, counted from the last, along which a constant has more than one number; None for others.

    A single number counts as one along the last axis.
    """
    sizes = shape(constant)
    long = [d - len(sizes) for d, size in enumerate(sizes) if size != 1]
    return None if len(long) > 1 else long[0] if long else -1


def _is_normed(root: Node | None) -> bool:
    """Return whether a value is of size 1, so that x·g + b·g is as exact as (x + b)·g: it is a norm's result, or
    was multiplied or divided by a number for each vector."""
    while root is not None and isinstance(rule := rule_of(root) if root.op == "call_function" else None, Movement):
        root = rule.source
    if root is None or root.op != "call_function":
        return False
    by_token = op_name(root) in ("aten::mul", "aten::div") and any(map(_is_token, root.all_input_nodes))
    return by_token or isinstance(rule_of(root), Normalization)


def _is_token(node: Node | None) -> bool:
    """Return whether a value holds one number for each vector."""
    return node is not None and shape(node)[-1:] == (1,)


def _add(c: _Collected, args: dict[str, Any]) -> Affine | None:
    return c.plus(c.of(args["self"]), c.scaled(c.of(args["other"]), args["alpha"]))


def _sub(c: _Collected, args: dict[str, Any]) -> Affine | None:
    return c.minus(c.of(args["self"]), c.of(args["other"]), args["alpha"])


def _rsub(c: _Collected, args: dict[str, Any]) -> Affine | None:
    return c.minus(c.of(args["other"]), c.of(args["self"]), args["alpha"])


def _neg(c: _Collected, args: dict[str, Any]) -> Affine | None:
    return c.scaled(c.of(args["self"]), -1)


def _mul(c: _Collected, args: dict[str, Any]) -> Affine | None:
    return c.times(c.of(args["self"]), c.of(args["other"]))


def _div(c: _Collected, args: dict[str, Any]) -> Affine | None:
    return None if args.get("rounding_mode") else c.times(c.of(args["self"]), c.inverse(args["other"]))


_FORMS: dict[str, Callable[[_Collected, dict[str, Any]], Affine | None]] = {
    f"aten::{name}": form
    for form, names in (
        (_add, "add"),
        (_sub, "sub subtract"),
        (_rsub, "rsub"),
        (_neg, "neg negative"),
        (_mul, "mul multiply"),
        (_div, "div divide true_divide"),
        (_Collected.normed, "batch_norm _native_batch_norm_legit_no_training"),
    )
    for name in names.split()
}

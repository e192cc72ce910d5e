"""Canonicalize:  x / g  ->  x · (1/g),   lerp(a, x, g)  ->  x·g + a·(1 − g),   x · expand(y)  ->  x · y,   and more.

What several operators of torch can say is said in one way, the one that the analysis knows scales and norms by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from spinpass.analysis import Zeros, rule_of
from spinpass.graph import ProgramEditor, arguments, is_float, is_op, op_name, shape, value

_aten = torch.ops.aten
_ORIGIN = "Canonicalize"


def canonicalize(editor: ProgramEditor) -> None:
    """Put operators that the analysis knows in place of those that say the same."""
    for node in list(editor.nodes):
        if not is_op(node) or not is_float(node) or editor.is_constant(node):
            continue
        if op_name(node) in _FACTORS:
            _read_unexpanded(node)
        rewrite = _REWRITES.get(op_name(node))
        if rewrite is not None:
            rewrite(editor, node, arguments(node))


def _read_unexpanded(node: Node) -> None:
    """x · expand(y)  ->  x · y:  the operator broadcasts by itself where another operand is as large as the result.

    Not summands: an expanded one has an axis of channels, and may be a constant that folds.
    """
    for operand in node.all_input_nodes:
        others = [n for n in node.all_input_nodes if n is not operand]
        source = _unexpanded(operand)
        if source is not operand and any(shape(o) == shape(node) for o in others):
            node.replace_input_with(operand, source)


def _unexpanded(node: Node) -> Node:
    """Return the value that the node repeats along axes on which broadcasting would repeat it as well."""
    while is_op(node) and op_name(node) in ("aten::expand", "aten::expand_as", "aten::repeat"):
        source = node.args[0]
        assert isinstance(source, Node)
        sizes, before = shape(node), shape(source)
        lead = len(sizes) - len(before)
        if op_name(node) == "aten::repeat" and not all(
            count == 1 or size == 1 for count, size in zip(arguments(node)["repeats"][lead:], before)
        ):
            return node
        node = source
    return node


def _division(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """x / g  ->  x · (1/g),   g a constant for each channel."""
    divisor = args["other"]
    exact = value(node).dtype in (torch.float32, torch.float64)  # 1/g would be rounded to 8 or 11 bits
    if not exact or args.get("rounding_mode") is not None or not _is_scale(editor, divisor, args["self"]):
        return
    if value(divisor).dtype != value(node).dtype:
        divisor = editor.call(_aten.to.dtype, divisor, value(node).dtype, after=divisor, origin=_ORIGIN)
    inverse = editor.call(_aten.reciprocal.default, divisor, after=divisor, origin=_ORIGIN)
    _put(editor, node, _aten.mul.Tensor, args["self"], inverse)


def _addcmul(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """addcmul(b, x, g)  ->  x·g + b."""
    one, two, added = args["tensor1"], args["tensor2"], args["self"]
    if _is_scale(editor, one, two) or _is_scale(editor, two, one):
        product = editor.call(_aten.mul.Tensor, one, two, after=node, origin=_ORIGIN)
        if args["value"] != 1:
            product = editor.call(_aten.mul.Tensor, product, args["value"], after=product, origin=_ORIGIN)
        if isinstance(rule_of(added), Zeros):
            _take_over(editor, node, product)
        else:
            _put(editor, node, _aten.add.Tensor, product, added, after=product)


def _lerp(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """lerp(a, x, g)  ->  x·g + a·(1 − g)."""
    start, end, weight = args["self"], args["end"], args["weight"]
    if not _is_scale(editor, weight, end):
        return
    if isinstance(rule_of(start), Zeros):
        return _put(editor, node, _aten.mul.Tensor, end, weight)
    rest = editor.call(_aten.rsub.Scalar, weight, 1, after=node, origin=_ORIGIN)
    shift = editor.call(_aten.mul.Tensor, rest, start, after=rest, origin=_ORIGIN)
    product = editor.call(_aten.mul.Tensor, end, weight, after=shift, origin=_ORIGIN)
    _put(editor, node, _aten.add.Tensor, product, shift, after=product)


def _group_norm(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """group_norm(x, 1) of (n, c)  ->  layer_norm(x);   groups of one channel, (n, c, l):  each normed along l."""
    x = args["input"]
    sizes, width, weight, bias = shape(x), shape(x)[-1], args["weight"], args["bias"]
    groups = args.get("num_groups", sizes[1])
    if not isinstance(width, int):
        return
    if len(sizes) == 2 and groups == 1:
        _put(editor, node, _aten.layer_norm.default, x, [width], weight, bias, args["eps"])
    elif len(sizes) == 3 and groups == sizes[1] and args.get("running_mean") is None:
        made = editor.call(_aten.layer_norm.default, x, [width], None, None, args["eps"], after=node, origin=_ORIGIN)
        for target, affine in ((_aten.mul.Tensor, weight), (_aten.add.Tensor, bias)):
            if affine is not None:
                kept = editor.call(_aten.unsqueeze.default, affine, -1, after=made, origin=_ORIGIN)
                made = editor.call(target, made, kept, after=kept, origin=_ORIGIN)
        _take_over(editor, node, made)


def _is_scale(editor: ProgramEditor, factor: Any, of: Any) -> bool:
    """Return whether ``factor`` is a constant that holds one number for each channel of the computed value ``of``."""
    if not isinstance(factor, Node) or not isinstance(of, Node) or editor.is_constant(of) or not is_float(factor):
        return False
    return editor.is_constant(factor) and shape(factor)[-1:] == shape(of)[-1:] and shape(factor)[-1:] != (1,)


def _put(editor: ProgramEditor, node: Node, target: Any, *args: Any, after: Node | None = None) -> None:
    """Put one operator in place of the node."""
    _take_over(editor, node, editor.call(target, *args, after=after or node, origin=_ORIGIN))


def _take_over(editor: ProgramEditor, node: Node, made: Node) -> None:
    if shape(made) == shape(node) and value(made).dtype == value(node).dtype:
        editor.replace(node, made)


_FACTORS = {f"aten::{n}" for n in ("mul", "div", "multiply", "divide", "true_divide", "addcmul", "lerp")}
_REWRITES: dict[str, Callable[[ProgramEditor, Node, dict[str, Any]], None]] = {
    f"aten::{name}": rewrite
    for rewrite, names in (
        (_division, "div divide true_divide"),
        (_addcmul, "addcmul"),
        (_lerp, "lerp"),
        (_group_norm, "group_norm instance_norm"),
    )
    for name in names.split()
}

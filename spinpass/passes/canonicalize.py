"""Canonicalize:  x · expand(y)  ->  x · y,   addcmul(a, x, y)  ->  a + x·y,   group_norm(x, 1)  ->  layer_norm(x).

What several operators of torch can say is said in one way, the one that the analysis knows.
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
        if not shape(source) and any(value(o).dtype != value(operand).dtype for o in others):
            continue  # a tensor without axes has no say in the dtype of the result
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


def _addcmul(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """addcmul(a, x, y)  ->  a + x·y,   addcdiv(a, x, y)  ->  a + x / y."""
    target = _aten.mul.Tensor if op_name(node) == "aten::addcmul" else _aten.div.Tensor
    made = editor.call(target, args["tensor1"], args["tensor2"], after=node, origin=_ORIGIN)
    if args["value"] != 1:
        made = editor.call(_aten.mul.Tensor, made, args["value"], after=made, origin=_ORIGIN)
    _put(editor, node, _aten.add.Tensor, args["self"], made, after=made)


def _lerp(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """lerp(a, x, w)  ->  a + (x − a)·w;  without a, where it is zero."""
    start, end, weight = args["self"], args["end"], args["weight"]
    if isinstance(rule_of(start), Zeros):
        return _put(editor, node, _aten.mul.Tensor, end, weight)
    way = editor.call(_aten.sub.Tensor, end, start, after=node, origin=_ORIGIN)
    part = editor.call(_aten.mul.Tensor, way, weight, after=way, origin=_ORIGIN)
    _put(editor, node, _aten.add.Tensor, start, part, after=part)


def _rsub(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """rsub(a, b)  ->  b − a."""
    if isinstance(args["other"], Node) and args["alpha"] == 1:
        _put(editor, node, _aten.sub.Tensor, args["other"], args["self"])


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


def _pool(editor: ProgramEditor, node: Node, args: dict[str, Any]) -> None:
    """avg_pool1d(x, n) of n coordinates,  adaptive_avg_pool1d(x, 1)  ->  mean(x)."""
    x = args["self"]
    width, kernel = shape(x)[-1], args.get("kernel_size")
    whole = list(kernel) == [width] and list(args["padding"]) == [0] if kernel else list(args["output_size"]) == [1]
    if whole and isinstance(width, int):
        _put(editor, node, _aten.mean.dim, x, [-1], True)


def _put(editor: ProgramEditor, node: Node, target: Any, *args: Any, after: Node | None = None) -> None:
    """Put one operator in place of the node."""
    _take_over(editor, node, editor.call(target, *args, after=after or node, origin=_ORIGIN))


def _take_over(editor: ProgramEditor, node: Node, made: Node) -> None:
    if shape(made) == shape(node) and value(made).dtype == value(node).dtype:
        editor.replace(node, made)


_FACTORS = {f"aten::{n}" for n in ("mul", "div", "multiply", "divide", "true_divide")}
_REWRITES: dict[str, Callable[[ProgramEditor, Node, dict[str, Any]], None]] = {
    f"aten::{name}": rewrite
    for rewrite, names in (
        (_addcmul, "addcmul addcdiv"),
        (_lerp, "lerp"),
        (_rsub, "rsub"),
        (_group_norm, "group_norm instance_norm"),
        (_pool, "avg_pool1d adaptive_avg_pool1d"),
    )
    for name in names.split()
}

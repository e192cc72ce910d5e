"""Operators whose result holds elements of one operand, moved, or those of several side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.graph import Layout, LayoutError, Size, arguments, is_float, is_op, op_name, shape, value

from .rules import Concatenate, Movement, Opaque, Rule, named


def source_through(node: Node) -> Node:
    """Return the node behind casts, copies and other identities."""
    while True:
        rule = _moved(node)
        if not (isinstance(rule, Movement) and rule.is_identity):
            return node
        node = rule.source


def _moved(node: Node) -> Rule | None:
    """Return the rule of a movement, and None for other operators."""
    if node.op == "call_function" and op_name(node) == "getitem":
        source, which = node.args
        if isinstance(source, Node) and op_name(source) in PIECES and isinstance(which, int):
            return piece(node, source, op_name(source), arguments(source), which)
    builder = MOVEMENTS.get(op_name(node)) if is_op(node) else None
    return None if builder is None else builder(node, arguments(node))


def identity(source: Node) -> Rule:
    return Movement(source, lambda layout: layout, lambda layout: layout, is_identity=True)


def same(node: Node, args: dict[str, Any]) -> Rule:
    source = next(iter(args.values()))
    if not is_float(node) or not is_float(source):
        return Opaque(f"{op_name(node)} to a type that is not floating point")
    return identity(source)


def _renaming(source: Node, to: dict[int, int]) -> Rule:
    back = {new: old for old, new in to.items()}
    return Movement(source, lambda layout: layout.renamed(to), lambda layout: layout.renamed(back))


def _permute(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["self"]))
    return _renaming(args["self"], {d % rank: i for i, d in enumerate(args["dims"])})


def _transpose(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["self"]))
    order = list(range(rank))
    a, b = (d % rank for d in args.values() if isinstance(d, int))  # dim0, dim1 or axis0, axis1
    order[a], order[b] = order[b], order[a]
    return _renaming(args["self"], {d: i for i, d in enumerate(order)})


def _reverse_axes(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["self"]))
    return _renaming(args["self"], {d: rank - 1 - d for d in range(rank)})


def _view(node: Node, args: dict[str, Any]) -> Rule:
    if "dtype" in args:
        return Opaque("a view of the bits as another type")
    before, after = shape(args["self"]), shape(node)
    return Movement(
        args["self"],
        lambda layout: layout.regrouped(before, after),
        lambda layout: layout.regrouped(after, before),
        is_identity=before == after,
    )


def selection(node: Node, source: Node, dim: int, index: Tensor | None, keeps_axis: bool = True) -> Rule:
    """Return the rule for elements ``index`` of axis ``dim``; without ``keeps_axis`` the axis disappears.

    ``index`` is int64 (selected,), or None where the positions are known at run time only.
    """
    before = shape(source)
    rank = len(before)
    drop = {d: d if d < dim else d - 1 for d in range(rank) if d != dim}
    restore = {new: old for old, new in drop.items()}

    def forward(layout: Layout) -> Layout | None:
        if dim in layout.dims and index is None:
            raise _unknown(node)
        kept = layout if index is None else layout.taken(dim, index, before[dim])
        return kept if kept is None or keeps_axis else kept.renamed(drop)

    def backward(layout: Layout) -> Layout:
        if keeps_axis:
            return layout.untaken(dim, index, before[dim])
        at = layout.renamed(restore)
        return at.untaken(dim, index, before[dim])

    whole = keeps_axis and index is not None and _is_everything(index, before[dim])
    return Movement(
        source, forward, backward, is_identity=whole or (keeps_axis and before == shape(node) and index is None)
    )


def _is_everything(index: Tensor, size: Size) -> bool:
    return isinstance(size, int) and torch.equal(index, torch.arange(size))


def _unknown(node: Node) -> Exception:
    return LayoutError(f"{op_name(node)} selects positions that are only known at run time")


def _slice(node: Node, args: dict[str, Any]) -> Rule:
    source = args["self"]
    size = shape(source)[args["dim"]]
    dim = args["dim"] % len(shape(source))
    if shape(source) == shape(node) and args["step"] == 1:
        return identity(source)
    bounds = (args["start"], args["end"], args["step"])
    if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
        return selection(node, source, dim, None)
    return selection(node, source, dim, torch.arange(size)[slice(*_bounded(size, *bounds))])


def _narrow(node: Node, args: dict[str, Any]) -> Rule:
    known = isinstance(args["start"], int) and isinstance(args["length"], int)
    end = args["start"] + args["length"] if known else None
    return _slice(
        node, {**args, "end": end, "step": 1} if known else {**args, "start": value(node), "end": None, "step": 1}
    )


def _bounded(size: int, start: int | None, end: int | None, step: int) -> tuple[int, int, int]:
    return slice(start, end, step).indices(size)


def _select(node: Node, args: dict[str, Any]) -> Rule:
    size = shape(args["self"])[args["dim"]]
    dim = args["dim"] % len(shape(args["self"]))
    known = isinstance(size, int) and isinstance(args["index"], int)
    return selection(node, args["self"], dim, torch.tensor([args["index"] % size]) if known else None, keeps_axis=False)


def _flip(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["self"]))
    if len(args["dims"]) != 1 or not isinstance(shape(args["self"])[args["dims"][0]], int):
        return Opaque("flip over several or dynamic axes")
    dim = args["dims"][0] % rank
    return selection(node, args["self"], dim, torch.arange(int(shape(args["self"])[dim])).flip(0))


def piece(node: Node, source: Node, name: str, args: dict[str, Any], which: int) -> Rule:
    """Return the rule for result ``which`` of split, chunk or unbind."""
    operand = args["self"]
    rank = len(shape(operand))
    dim = args["dim"] % rank
    size = shape(operand)[dim]
    if name == "aten::unbind":
        return selection(node, operand, dim, torch.tensor([which]), keeps_axis=False)
    lengths = [v.shape[dim] for v in value(source)]
    if not isinstance(size, int) or not all(isinstance(n, int) for n in lengths):
        return selection(node, operand, dim, None)
    start = sum(lengths[:which])
    return selection(node, operand, dim, torch.arange(start, start + lengths[which]))


def _repeat(node: Node, args: dict[str, Any]) -> Rule:
    """The operator repeats axes, which must be free ones and are free in the result as well."""
    source = args["self"]
    before, after = shape(source), shape(node)
    lead = len(after) - len(before)
    grown = {d for d in range(len(before)) if before[d] != after[d + lead]}

    def check(layout: Layout) -> Layout:
        if grown & set(layout.dims):
            raise LayoutError("the axis is repeated")
        return layout

    to = {d: d + lead for d in range(len(before))}
    back = {new: old for old, new in to.items()}

    def backward(layout: Layout) -> Layout:
        if any(d not in back for d in layout.dims):
            raise LayoutError("the axis is made by repetition")
        return check(layout.renamed(back))

    return Movement(source, lambda layout: check(layout).renamed(to), backward)


def _repeat_interleave(node: Node, args: dict[str, Any]) -> Rule:
    return Opaque("repeat_interleave of a flattened tensor") if args.get("dim") is None else _repeat(node, args)


def _cat(node: Node, args: dict[str, Any]) -> Rule:
    sources = tuple(s for s in args["tensors"] if len(shape(s)) == len(shape(node)))  # torch allows empty 1-D operands
    return Concatenate(sources, args["dim"] % len(shape(node)))


def _copy(node: Node, args: dict[str, Any]) -> Rule:
    if shape(args["src"]) != shape(node) or not is_float(args["src"]):
        return Opaque("a copy of values of another shape or type")
    return identity(args["src"])


MOVEMENTS = named(
    [
        (
            same,
            "to _to_copy clone contiguous alias detach detach_ dropout "
            "native_dropout type_as lift_fresh_copy lift_fresh positive feature_dropout",
        ),
        (_permute, "permute"),
        (_transpose, "transpose swapaxes"),
        (_reverse_axes, "t numpy_T"),
        (_view, "view reshape _unsafe_view flatten unflatten unsqueeze squeeze view_as _reshape_alias"),
        (_slice, "slice"),
        (_narrow, "narrow"),
        (_select, "select"),
        (_flip, "flip"),
        (_repeat, "repeat tile expand expand_as broadcast_to"),
        (_repeat_interleave, "repeat_interleave"),
        (_cat, "cat concat concatenate"),
        (_copy, "copy"),
    ]
)
"""The movements, and what puts values side by side."""

PIECES = {f"aten::{n}" for n in ("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")}
"""The operators whose several results are pieces of their operand."""

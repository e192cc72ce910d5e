"""Operators whose result holds elements of one operand, moved, or those of several side by side."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.graph import Layout, LayoutError, Size, is_op, op_name, shape, value

from .calls import Call, answer, named
from .rules import Concatenate, Movement, Opaque, Rule


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
            return answer(piece, Call(source, node, which))
    builder = MOVEMENTS.get(op_name(node)) if is_op(node) else None
    return None if builder is None else answer(builder, Call(node))


def identity(source: Node) -> Rule:
    """Return the rule of an operator that changes no value."""
    return Movement(source, lambda layout: layout, lambda layout: layout, is_identity=True)


def same(call: Call) -> Rule:
    """The operator changes no value, or rounds it."""
    call.account("other")
    return identity(call["self"])


def _dropout(call: Call) -> Rule:
    rate, active = call["p"], call["train"]
    if rate != 0 and active is not False:
        return Opaque("active dropout")
    return identity(call["input"])


def _renaming(source: Node, to: dict[int, int]) -> Rule:
    back = {new: old for old, new in to.items()}
    return Movement(source, lambda layout: layout.renamed(to), lambda layout: layout.renamed(back))


def _permute(call: Call) -> Rule:
    rank = len(shape(call["self"]))
    return _renaming(call["self"], {d % rank: i for i, d in enumerate(call["dims"])})


def _transpose(call: Call) -> Rule:
    rank = len(shape(call["self"]))
    order = list(range(rank))
    a, b = (call.axis(name, rank) for name in (("dim0", "dim1") if "dim0" in call else ("axis0", "axis1")))
    if not rank:
        return identity(call["self"])
    order[a], order[b] = order[b], order[a]
    return _renaming(call["self"], {d: i for i, d in enumerate(order)})


def _reverse_axes(call: Call) -> Rule:
    rank = len(shape(call["self"]))
    return _renaming(call["self"], {d: rank - 1 - d for d in range(rank)})


def _view(call: Call) -> Rule:
    """The elements stay in their order, so that the shape of the result says all."""
    if "dtype" in call:
        return Opaque("a view of the bits as another type")
    if "stride" in call and not _is_packed(call["self"], call.node):
        return Opaque(f"{call.name} with strides of its own")
    call.account("size", "shape", "sizes", "dim", "start_dim", "end_dim", "other", "stride")
    before, after = shape(call["self"]), shape(call.node)
    return Movement(
        call["self"],
        lambda layout: layout.regrouped(before, after),
        lambda layout: layout.regrouped(after, before),
        is_identity=before == after,
    )


def _is_packed(*nodes: Node) -> bool:
    return all(value(n).is_contiguous() for n in nodes)


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
    return isinstance(size, int) and torch.equal(index, torch.arange(size, device="cpu"))


def _unknown(node: Node) -> Exception:
    return LayoutError(f"{op_name(node)} selects positions that are only known at run time")


def _slice(call: Call) -> Rule:
    return _sliced(call, call["start"], call["end"], call["step"])


def _narrow(call: Call) -> Rule:
    start, length = call["start"], call["length"]
    size = shape(call["self"])[call["dim"]]
    if not all(isinstance(given, int) for given in (start, length, size)):
        return _sliced(call, call.node, None, 1)
    start %= size + 1 if start >= 0 else size  # a negative start counts from the end
    return _sliced(call, start, start + length, 1)


def _sliced(call: Call, start: object, end: object, step: object) -> Rule:
    """Return the rule for a slice of an axis. Bounds that are no integers are known at run time only."""
    source, rank = call["self"], len(shape(call["self"]))
    dim = call.axis("dim", rank)
    size = shape(source)[dim]
    if shape(source) == shape(call.node) and step == 1:
        return identity(source)
    if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in (start, end, step)):
        return selection(call.node, source, dim, None)
    return selection(call.node, source, dim, torch.arange(size, device="cpu")[start:end:step])


def _select(call: Call) -> Rule:
    source, index = call["self"], call["index"]
    dim = call.axis("dim", len(shape(source)))
    size = shape(source)[dim]
    known = isinstance(size, int) and isinstance(index, int)
    return selection(
        call.node, source, dim, torch.tensor([index % size], device="cpu") if known else None, keeps_axis=False
    )


def _flip(call: Call) -> Rule:
    source, given = call["self"], call["dims"]
    if not given:
        return identity(source)
    dim = given[0] % max(len(shape(source)), 1)
    if len(given) != 1 or not shape(source) or not isinstance(shape(source)[dim], int):
        return Opaque("flip over several or dynamic axes")
    return selection(call.node, source, dim, torch.arange(int(shape(source)[dim]), device="cpu").flip(0))


def piece(call: Call) -> Rule:
    """The operator splits, chunks or unbinds its operand, and the rule is that of one of the pieces."""
    operand, which = call["self"], call.which
    call.account("split_size", "split_sizes", "chunks")  # the shapes of the pieces say them
    assert which is not None
    pieces = value(call.operator)
    which %= len(pieces)
    dim = call.axis("dim", len(shape(operand)))
    if call.name == "aten::unbind":
        return selection(call.node, operand, dim, torch.tensor([which], device="cpu"), keeps_axis=False)
    lengths = [v.shape[dim] for v in pieces]
    if not isinstance(shape(operand)[dim], int) or not all(isinstance(n, int) for n in lengths):
        return selection(call.node, operand, dim, None)
    start = sum(lengths[:which])
    return selection(call.node, operand, dim, torch.arange(start, start + lengths[which], device="cpu"))


def _repeat(call: Call) -> Rule:
    """The operator repeats axes, which must be free ones and are free in the result as well."""
    call.account("repeats", "dims", "size", "other")  # the shape of the result says them
    before, after = shape(call["self"]), shape(call.node)
    lead = len(after) - len(before)
    return _repeated(call["self"], {d for d in range(len(before)) if before[d] != after[d + lead]}, lead)


def _repeated(source: Node, grown: set[int], lead: int) -> Rule:
    """Return the rule for repetition along the axes ``grown``, with ``lead`` new axes before all others."""

    def check(layout: Layout) -> Layout:
        if grown & set(layout.dims):
            raise LayoutError("the axis is repeated")
        return layout

    to = {d: d + lead for d in range(len(shape(source)))}
    back = {new: old for old, new in to.items()}

    def backward(layout: Layout) -> Layout:
        if any(d not in back for d in layout.dims):
            raise LayoutError("the axis is made by repetition")
        return check(layout.renamed(back))

    return Movement(source, lambda layout: check(layout).renamed(to), backward)


def _repeat_interleave(call: Call) -> Rule:
    """The operator repeats each element of one axis, perhaps each a number of times of its own."""
    if call.get("dim") is None:
        return Opaque("repeat_interleave of a flattened tensor")
    call.account("repeats")  # nothing passes along the axis, whatever they are
    return _repeated(call["self"], {call.axis("dim", len(shape(call["self"])))}, 0)


def _cat(call: Call) -> Rule:
    rank = len(shape(call.node))
    sources = [s for s in call["tensors"] if len(shape(s)) == rank]
    for empty in set(call["tensors"]) - set(sources):  # torch allows empty 1-D operands
        call.leave_out(empty)
    return Concatenate(tuple(sources), call.axis("dim", rank))


def _copy(call: Call) -> Rule:
    call.account("self")
    if shape(call["src"]) != shape(call.node):
        return Opaque("a copy of values of another shape")
    return identity(call["src"])


MOVEMENTS = named(
    [
        (
            same,
            "to _to_copy clone contiguous alias detach detach_ type_as lift_fresh_copy lift_fresh positive",
        ),
        (_dropout, "dropout native_dropout feature_dropout"),
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

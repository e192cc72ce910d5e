"""Operators that read or write some positions of axes; the other axes pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from spinpass.graph import is_op, known_integers, op_name, shape, value

from .calls import Call, named
from .movements import selection
from .rules import Multilinear, Opaque, Operand, Rule


def _embedding(call: Call) -> Rule:
    rows = tuple(range(len(shape(call["indices"]))))
    return Multilinear(((Operand(call["weight"], (None, "o")),),), (*rows, "o"), (call["indices"],))


def _index(call: Call) -> Rule:
    """x[i, j, :]: indexed axes are gathered, the others pass."""
    source, indices = call["self"], call["indices"]
    at = [d for d, i in enumerate(indices) if i is not None]
    if not at or at != list(range(at[0], at[0] + len(at))):
        return Opaque("index with separated index tensors")
    if any(map(_is_mask, (indices[d] for d in at))):
        return _masked_rows(source, indices, at)
    known, size = known_integers(indices[at[0]]), shape(source)[at[0]]
    if len(at) == 1 and known is not None and known.ndim == 1 and isinstance(size, int):
        wrapped = known % size
        if torch.unique(wrapped).numel() == wrapped.numel():
            call.leave_out(indices[at[0]])
            return selection(call.node, source, at[0], wrapped)
    drawn = max(len(shape(indices[d])) for d in at)
    rank = len(shape(source))
    labels = tuple(None if d in at else f"x{d}" for d in range(rank))
    out = (*labels[: at[0]], *(f"i{k}" for k in range(drawn)), *labels[at[-1] + 1 :])
    return Multilinear(((Operand(source, labels),),), out, tuple(indices[d] for d in at))


def _masked_rows(source: Node, indices: Sequence[Any], at: list[int]) -> Rule:
    """x[mask]: the axes under the mask become one, of dynamic length; the others pass."""
    if at != [0]:
        return Opaque("index with a mask behind other axes")
    rest = tuple(f"x{d}" for d in range(len(shape(indices[0])), len(shape(source))))
    labels = (*(None,) * len(shape(indices[0])), *rest)
    return Multilinear(((Operand(source, labels),),), (None, *rest), (indices[0],))


def _is_mask(index: Node) -> bool:
    """Return whether an index says of each position whether it is taken: it goes along as many axes as it has."""
    return value(index).dtype in (torch.bool, torch.uint8)


def _index_select(call: Call) -> Rule:
    rank = len(shape(call["self"]))
    dim = call.axis("dim", rank)
    labels = tuple(None if d == dim else d for d in range(rank))
    return Multilinear(((Operand(call["self"], labels),),), labels, (call["index"],))


def _write_along(call: Call, written: Node, dims: set[int], opaque: Sequence[Node]) -> Rule:
    """Return the rule of x with ``written`` at some positions of axes ``dims``: other axes of both share one basis."""
    rank = len(shape(call.node))
    labels = tuple(None if d in dims else d for d in range(rank))
    lead = rank - len(shape(written))
    if lead < 0:
        return Opaque("values of more axes than they are written to")
    sizes = shape(call.node)[lead:]
    inner = tuple(labels[d + lead] if size == sizes[d] else None for d, size in enumerate(shape(written)))
    return Multilinear(((Operand(call["self"], labels),), (Operand(written, inner),)), labels, tuple(opaque))


def _stack(call: Call) -> Rule:
    """The operator puts values side by side along a new axis."""
    rank = len(shape(call.node))
    axis = call.axis("dim", rank)
    labels = tuple(d for d in range(rank) if d != axis)
    out = tuple(d if d != axis else None for d in range(rank))
    return Multilinear(tuple((Operand(t, labels),) for t in call["tensors"]), out)


def _index_write(call: Call) -> Rule:
    call.account("alpha")  # which scales all channels of what is written
    return _write_along(call, call["source"], {call.axis("dim", len(shape(call.node)))}, [call["index"]])


def _index_put(call: Call) -> Rule:
    indices = call["indices"]
    call.account("accumulate")  # what is written is added, or takes the place of what was there
    at = {d for d, i in enumerate(indices) if i is not None}
    if any(_is_mask(indices[d]) for d in at):
        if at != {0}:
            return Opaque("index_put with a mask behind or beside other indices")
        at = set(range(len(shape(indices[0]))))
    if not at or max(at) >= len(shape(call.node)) - 1:
        return Opaque("index_put along the last axis")
    if at != set(range(min(at), max(at) + 1)):
        return Opaque("index_put with separated index tensors")
    return _write_along(call, call["values"], set(range(max(at) + 1)), [i for i in indices if i is not None])


def _masked_scatter(call: Call) -> Rule:
    """The operator puts rows of ``source``, in order, where the mask is true.

    Whole vectors are written if the mask is constant along them (image features that take the places of their tokens).
    """
    target, mask, source = call["self"], call["mask"], call["source"]
    if not shape(target) or shape(target) != shape(call.node):
        return Opaque("masked_scatter with a mask of more axes")
    last, rank = shape(target)[-1], len(shape(target))
    if len(shape(source)) < 2 or shape(source)[-1] != last or not isinstance(last, int):
        return Opaque("masked_scatter of values that are not whole vectors")
    if not _constant_along_last(mask):
        return Opaque("masked_scatter with a mask of its own for each channel")
    free = (None,) * (rank - 1)
    written = Operand(source, ((None,) * (len(shape(source)) - 1)) + ("o",))
    return Multilinear(((Operand(target, (*free, "o")),), (written,)), (*free, "o"), (mask,))


def _constant_along_last(node: Node) -> bool:
    """Return whether the values are the same along the last axis, because it was made by expanding one element."""
    while shape(node)[-1:] != (1,):
        if not is_op(node) or op_name(node) not in _EXPANDS | _UNCHANGED or not shape(node):
            return False
        node = node.all_input_nodes[0]
    return True


def _scatter(call: Call) -> Rule:
    """The operator puts or adds rows of ``src`` at ``index`` along one axis of ``self``.

    Whole vectors are written if the index is constant along them.
    """
    target, index, source = call["self"], call["index"], call.get("src")
    rank = len(shape(call.node))
    call.account("include_self")  # whether what was there counts as well, at the positions that are written
    if not isinstance(source, Node):
        return Opaque("scatter of one number")
    if call.axis("dim", rank) >= rank - 1 or not _constant_along_last(index):
        return Opaque(f"{call.name} along the channels")
    channels = shape(call.node)[-1]
    if any(len(shape(n)) != rank or shape(n)[-1] != channels for n in (index, source)):
        return Opaque(f"{call.name} of other values than whole vectors")
    if call.get("reduce", "sum") not in ("sum", "add"):
        return Opaque(f"{call.name} that does not add")
    labels = (*(None,) * (rank - 1), "o")
    return Multilinear(((Operand(target, labels),), (Operand(source, labels),)), labels, (index,))


def _gather(call: Call) -> Rule:
    """The operator takes elements at ``index`` along one axis: whole vectors if the index is constant along them."""
    rank = len(shape(call.node))
    if call.axis("dim", rank) >= rank - 1 or not _constant_along_last(call["index"]):
        return Opaque("aten::gather does not commute with a rotation")
    labels = (*(None,) * (rank - 1), "o")
    if len(shape(call["self"])) != rank or shape(call["self"])[-1] != shape(call.node)[-1]:
        return Opaque("a gather of some of the channels")
    return Multilinear(((Operand(call["self"], labels),),), labels, (call["index"],))


def _select_scatter(call: Call) -> Rule:
    rank = len(shape(call.node))
    call.account("index")  # nothing passes along the axis, wherever it is
    dim = call.axis("dim", rank)
    labels = tuple(None if d == dim else d for d in range(rank))
    written = Operand(call["src"], labels[:dim] + labels[dim + 1 :])
    return Multilinear(((Operand(call["self"], labels),), (written,)), labels)


def _along(source: Node, dims: set[int]) -> Rule:
    """Return the rule of a linear operator that acts along ``dims`` alone, the same at every position of other axes."""
    labels = tuple(None if d in dims else d for d in range(len(shape(source))))
    return Multilinear(((Operand(source, labels),),), labels)


def _roll(call: Call) -> Rule:
    call.account("shifts")  # nothing passes along the axes, however far
    return _along(call["self"], set(call.axes("dims", len(shape(call.node)))))


def _pad(call: Call) -> Rule:
    """The operator puts zeros before or behind some axes."""
    if call.get("value", 0) not in (0, None) or call.get("mode", "constant") != "constant":
        return Opaque("padding with other values than zero")
    rank, widths = len(shape(call.node)), call["pad"]
    return _along(call["self"], {rank - 1 - k // 2 for k, width in enumerate(widths) if width != 0})


def _slice_scatter(call: Call) -> Rule:
    call.account("start", "end", "step")  # nothing passes along the axis, whatever they are
    return _write_along(call, call["src"], {call.axis("dim", len(shape(call.node)))}, [])


INDEXING = named(
    [
        (_stack, "stack"),
        (_embedding, "embedding"),
        (_index, "index"),
        (_index_select, "index_select"),
        (_index_write, "index_copy index_add"),
        (_index_put, "index_put _unsafe_index_put"),
        (_slice_scatter, "slice_scatter"),
        (_select_scatter, "select_scatter"),
        (_masked_scatter, "masked_scatter"),
        (_scatter, "scatter scatter_add scatter_reduce"),
        (_gather, "gather"),
        (_roll, "roll"),
        (_pad, "pad constant_pad_nd"),
    ]
)
"""The operators that index."""

_EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to", "aten::repeat"}
_UNCHANGED = {f"aten::{n}" for n in ["to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"]}

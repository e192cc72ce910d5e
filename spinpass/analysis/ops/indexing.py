"""Operators that read or write some positions of axes; the other axes pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from spinpass.graph import is_op, known_integers, op_name, shape, value

from .movements import selection
from .rules import Multilinear, Opaque, Operand, Rule, named


def _embedding(node: Node, args: dict[str, Any]) -> Rule:
    rows = tuple(range(len(shape(args["indices"]))))
    return Multilinear(((Operand(args["weight"], (None, "o")),),), (*rows, "o"), (args["indices"],))


def _index(node: Node, args: dict[str, Any]) -> Rule:
    """x[i, j, :]: indexed axes are gathered, the others pass."""
    source, indices = args["self"], args["indices"]
    at = [d for d, i in enumerate(indices) if i is not None]
    if not at or at != list(range(at[0], at[0] + len(at))):
        return Opaque("index with separated index tensors")
    if any(value(indices[d]).dtype in (torch.bool, torch.uint8) for d in at):
        return _masked_rows(source, indices, at)
    known, size = known_integers(indices[at[0]]), shape(source)[at[0]]
    if len(at) == 1 and known is not None and known.ndim == 1 and isinstance(size, int):
        wrapped = known % size
        if torch.unique(wrapped).numel() == wrapped.numel():
            return selection(node, source, at[0], wrapped)
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


def _index_select(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["self"]))
    labels = tuple(None if d == args["dim"] % rank else d for d in range(rank))
    return Multilinear(((Operand(args["self"], labels),),), labels, (args["index"],))


def _write_along(node: Node, args: dict[str, Any], written: Node, dims: set[int], opaque: Sequence[Node]) -> Rule:
    """Return the rule of x with ``written`` at some positions of axes ``dims``: other axes of both share one basis."""
    rank = len(shape(node))
    labels = tuple(None if d in dims else d for d in range(rank))
    lead = rank - len(shape(written))
    if lead < 0:
        return Opaque("values of more axes than they are written to")
    inner = tuple(labels[d + lead] if size == shape(node)[d + lead] else None for d, size in enumerate(shape(written)))
    return Multilinear(((Operand(args["self"], labels),), (Operand(written, inner),)), labels, tuple(opaque))


def _stack(node: Node, args: dict[str, Any]) -> Rule:
    """The operator puts values side by side along a new axis."""
    axis = args["dim"] % len(shape(node))
    labels = tuple(d for d in range(len(shape(node))) if d != axis)
    out = tuple(d if d != axis else None for d in range(len(shape(node))))
    return Multilinear(tuple((Operand(t, labels),) for t in args["tensors"]), out)


def _index_copy(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(node))
    return _write_along(node, args, args["source"], {args["dim"] % rank}, [args["index"]])


def _index_put(node: Node, args: dict[str, Any]) -> Rule:
    indices = args["indices"]
    at = {d for d, i in enumerate(indices) if i is not None}
    if at == {0} and value(indices[0]).dtype is torch.bool:
        at = set(range(len(shape(indices[0]))))  # a mask takes as many axes as it has
    if not at or max(at) >= len(shape(node)) - 1:
        return Opaque("index_put along the last axis")
    if at != set(range(min(at), max(at) + 1)):
        return Opaque("index_put with separated index tensors")
    return _write_along(node, args, args["values"], set(range(max(at) + 1)), [i for i in indices if i is not None])


def _masked_scatter(node: Node, args: dict[str, Any]) -> Rule:
    """The operator puts rows of ``source``, in order, where the mask is true.

    Whole vectors are written if the mask is constant along them (image features that take the places of their tokens).
    """
    target, mask, source = args["self"], args["mask"], args["source"]
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


def _scatter(node: Node, args: dict[str, Any]) -> Rule:
    """The operator puts or adds rows of ``src`` at ``index`` along one axis of ``self``.

    Whole vectors are written if the index is constant along them.
    """
    rank, source = len(shape(node)), args.get("src")
    if not isinstance(source, Node):
        return Opaque("scatter of one number")
    if args["dim"] % rank == rank - 1 or not _constant_along_last(args["index"]):
        return Opaque(f"{op_name(node)} along the channels")
    if len(shape(source)) != rank or shape(source)[-1] != shape(node)[-1] or args.get("reduce", "sum") != "sum":
        return Opaque(f"{op_name(node)} of other values than whole vectors")
    labels = (*(None,) * (rank - 1), "o")
    return Multilinear(((Operand(args["self"], labels),), (Operand(source, labels),)), labels, (args["index"],))


def _gather(node: Node, args: dict[str, Any]) -> Rule:
    """The operator takes elements at ``index`` along one axis: whole vectors if the index is constant along them."""
    rank = len(shape(node))
    if args["dim"] % rank == rank - 1 or not _constant_along_last(args["index"]):
        return Opaque("aten::gather does not commute with a rotation")
    labels = (*(None,) * (rank - 1), "o")
    if shape(args["self"])[-1] != shape(node)[-1]:
        return Opaque("a gather of some of the channels")
    return Multilinear(((Operand(args["self"], labels),),), labels, (args["index"],))


def _select_scatter(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(node))
    dim = args["dim"] % rank
    labels = tuple(None if d == dim else d for d in range(rank))
    written = Operand(args["src"], labels[:dim] + labels[dim + 1 :])
    return Multilinear(((Operand(args["self"], labels),), (written,)), labels)


def _index_add(node: Node, args: dict[str, Any]) -> Rule:
    return _write_along(node, args, args["source"], {args["dim"] % len(shape(node))}, [args["index"]])


def _along(node: Node, source: Node, dims: set[int]) -> Rule:
    """Return the rule of a linear operator that acts along ``dims`` alone, the same at every position of other axes."""
    labels = tuple(None if d in dims else d for d in range(len(shape(source))))
    return Multilinear(((Operand(source, labels),),), labels)


def _roll(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(node))
    dims = {d % rank for d in args["dims"]} or set(range(rank))
    return _along(node, args["self"], dims)


def _pad(node: Node, args: dict[str, Any]) -> Rule:
    """The operator puts zeros before or behind some axes."""
    if args.get("value", 0) not in (0, None) or args.get("mode", "constant") != "constant":
        return Opaque("padding with other values than zero")
    rank, widths = len(shape(node)), args["pad"]
    return _along(node, args["self"], {rank - 1 - k // 2 for k, width in enumerate(widths) if width != 0})


def _slice_scatter(node: Node, args: dict[str, Any]) -> Rule:
    return _write_along(node, args, args["src"], {args["dim"] % len(shape(node))}, [])


INDEXING = named(
    [
        (_stack, "stack"),
        (_embedding, "embedding"),
        (_index, "index"),
        (_index_select, "index_select"),
        (_index_copy, "index_copy"),
        (_index_put, "index_put _unsafe_index_put"),
        (_slice_scatter, "slice_scatter"),
        (_select_scatter, "select_scatter"),
        (_masked_scatter, "masked_scatter"),
        (_scatter, "scatter scatter_add scatter_reduce"),
        (_gather, "gather"),
        (_index_add, "index_add"),
        (_roll, "roll"),
        (_pad, "pad constant_pad_nd"),
    ]
)
"""The operators that index."""

_EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to", "aten::repeat"}
_UNCHANGED = {f"aten::{n}" for n in ["to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"]}

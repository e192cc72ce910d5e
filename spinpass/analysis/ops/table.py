"""The table of operators: for each of them, what builds its rule from a call.

An operator that is not in the table is opaque: to refuse is always right. Every builder takes a call and its arguments
by the names of the schema, and returns the rule; its docstring says what the operator does where the rule does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.graph import Layout, LayoutError, Size, arguments, is_float, is_op, known_integers, op_name, shape, value

from .rules import (
    Centring,
    Concatenate,
    Ignored,
    Label,
    Mean,
    Movement,
    Multilinear,
    Normalization,
    Opaque,
    Operand,
    Rule,
    Several,
    Square,
    VectorNorm,
    Zeros,
)


def rule_of(node: Node) -> Rule:
    """Return the rule of a node's operator, which is Opaque for operators that are not in the table."""
    if node.op == "call_function" and op_name(node) == "getitem":
        return _item(node)
    if not is_op(node):
        return Opaque(f"{op_name(node)} is not an operator on tensors")
    name = op_name(node)
    if name in _CHECKS:
        return Ignored()
    if name in _SEVERAL:
        return Several()
    builder = _TABLE.get(name)
    if builder is None:
        return Opaque(f"{name} does not commute with a rotation")
    return builder(node, arguments(node))


def may_contract(node: Node) -> bool:
    """Return whether the operator's rule may contract two operands: those of products may, not of sums or movements."""
    return is_op(node) and _TABLE.get(op_name(node)) in _CONTRACTIONS


def source_through(node: Node) -> Node:
    """Return the node behind casts, copies and other identities."""
    while True:
        rule = rule_of(node)
        if not (isinstance(rule, Movement) and rule.is_identity):
            return node
        node = rule.source


# -- movements ---------------------------------------------------------------------------------------------------------


def _identity(source: Node) -> Rule:
    return Movement(source, lambda layout: layout, lambda layout: layout, is_identity=True)


def _same(node: Node, args: dict[str, Any]) -> Rule:
    source = next(iter(args.values()))
    if not is_float(node) or not is_float(source):
        return Opaque(f"{op_name(node)} to a type that is not floating point")
    return _identity(source)


def _negate(node: Node, args: dict[str, Any]) -> Rule:
    return _elementwise(node, [args["self"]])


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


def _selection(node: Node, source: Node, dim: int, index: Tensor | None, keeps_axis: bool = True) -> Rule:
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
        return _identity(source)
    bounds = (args["start"], args["end"], args["step"])
    if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
        return _selection(node, source, dim, None)
    return _selection(node, source, dim, torch.arange(size)[slice(*_bounded(size, *bounds))])


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
    return _selection(
        node, args["self"], dim, torch.tensor([args["index"] % size]) if known else None, keeps_axis=False
    )


def _flip(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["self"]))
    if len(args["dims"]) != 1 or not isinstance(shape(args["self"])[args["dims"][0]], int):
        return Opaque("flip over several or dynamic axes")
    dim = args["dims"][0] % rank
    return _selection(node, args["self"], dim, torch.arange(int(shape(args["self"])[dim])).flip(0))


def _item(node: Node) -> Rule:
    source, which = node.args
    if not isinstance(source, Node) or not is_op(source):
        return Opaque("getitem")
    name, args = op_name(source), arguments(source)
    if name in _NATIVE_NORMS:
        return _native_norm(source, args) if which == 0 else Opaque(f"the statistics of {name}")
    if name in _NATIVE_ATTENTION:
        return _attention(source, args) if which == 0 else Opaque(f"the statistics of {name}")
    if name not in _SEVERAL or not isinstance(which, int):
        return Opaque(f"{name} does not commute with a rotation")
    return _piece(node, source, name, args, which)


def _piece(node: Node, source: Node, name: str, args: dict[str, Any], which: int) -> Rule:
    """Return the rule for result ``which`` of split, chunk or unbind."""
    operand = args["self"]
    rank = len(shape(operand))
    dim = args["dim"] % rank
    size = shape(operand)[dim]
    if name == "aten::unbind":
        return _selection(node, operand, dim, torch.tensor([which]), keeps_axis=False)
    lengths = [v.shape[dim] for v in value(source)]
    if not isinstance(size, int) or not all(isinstance(n, int) for n in lengths):
        return _selection(node, operand, dim, None)
    start = sum(lengths[:which])
    return _selection(node, operand, dim, torch.arange(start, start + lengths[which]))


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


# -- sums of products --------------------------------------------------------------------------------------------------


def _aligned(operand: Node, out: Sequence[object]) -> Operand:
    """Return an operand that is broadcast to the result, with labels. The result's axes are labelled by their index."""
    sizes = shape(operand)
    lead = len(out) - len(sizes)
    return Operand(
        operand, tuple(d + lead if size != 1 or out[d + lead] == 1 else None for d, size in enumerate(sizes))
    )


def _elementwise(node: Node, *terms: Sequence[Any], opaque: Sequence[Any] = ()) -> Rule:
    out = shape(node)
    products = tuple(tuple(_aligned(o, out) for o in term if isinstance(o, Node)) for term in terms)
    return Multilinear(products, tuple(range(len(out))), tuple(o for o in opaque if isinstance(o, Node)))


def _add(node: Node, args: dict[str, Any]) -> Rule:
    if args["other"] == 0:
        return _same(node, args)
    centring = _centring(node, args)
    return centring or _elementwise(node, [args["self"]], [args["other"]])


def _centring(node: Node, args: dict[str, Any]) -> Rule | None:
    """x − mean(x): return its rule, also where the mean is cast in between, or None for other differences."""
    x, other = args["self"], args["other"]
    if op_name(node) not in ("aten::sub", "aten::sub_") or args.get("alpha", 1) != 1:
        return None
    if not isinstance(x, Node) or not isinstance(other, Node):
        return None
    mean = rule_of(source_through(other))
    if (
        isinstance(mean, Mean)
        and source_through(mean.source) is source_through(x)
        and len(shape(other)) == len(shape(x))
    ):
        return Centring(x, source_through(other), mean.dims)
    return None


def _mul(node: Node, args: dict[str, Any]) -> Rule:
    x, other = args["self"], args["other"]
    if x is other:
        return Square(x)
    return _elementwise(node, [x, other])


def _div(node: Node, args: dict[str, Any]) -> Rule:
    if args.get("rounding_mode") is not None:
        return Opaque("a rounding division")
    return _elementwise(node, [args["self"], args["other"]], opaque=[args["other"]])


def _pow(node: Node, args: dict[str, Any]) -> Rule:
    if args.get("exponent", 2) == 2:
        return Square(args["self"])
    return Opaque("aten::pow does not commute with a rotation")


def _where(node: Node, args: dict[str, Any]) -> Rule:
    condition = args["condition"]
    values = [v for v in (args["self"], args["other"]) if not _is_zero(v)]
    return _elementwise(node, *([condition, v] for v in values), opaque=[condition])


def _is_zero(value: Any) -> bool:
    """Return whether the value is the number zero, or one made by the program."""
    if not isinstance(value, Node):
        return bool(value == 0)
    return set(shape(value)) <= {1} and isinstance(rule_of(value), Zeros)


def _masked_fill(node: Node, args: dict[str, Any]) -> Rule:
    terms = [[args["mask"], args["self"]]] + ([] if args["value"] == 0 else [[args["mask"], args["value"]]])
    return _elementwise(node, *terms, opaque=[args["mask"]])


def _linear(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(args["input"]))
    batch = tuple(range(rank - 1))
    terms: list[tuple[Operand, ...]] = [
        (
            Operand(args["input"], (*batch, "i")),
            Operand(args["weight"], ("o", "i") if len(shape(args["weight"])) == 2 else ("i",)),
        )
    ]
    if args["bias"] is not None:
        terms.append((Operand(args["bias"], ("o",)),))
    return Multilinear(tuple(terms), (*batch, "o"))


def _product(a: Node, b: Node, out_rank: int) -> tuple[tuple[Operand, Operand], tuple[Label, ...]]:
    """Return matmul's operands, (..., m, k)·(..., k, n) or vectors as they come, and the labels of its result."""
    lead = out_rank - (len(shape(a)) > 1) - (len(shape(b)) > 1)

    def batch(x: Node) -> tuple[Label | None, ...]:
        sizes = shape(x)[:-2]
        return tuple(lead - len(sizes) + d if s != 1 else None for d, s in enumerate(sizes))

    left = (*batch(a), "m", "k") if len(shape(a)) > 1 else ("k",)
    right = (*batch(b), "k", "n") if len(shape(b)) > 1 else ("k",)
    out = (*range(lead), *(("m",) if len(shape(a)) > 1 else ()), *(("n",) if len(shape(b)) > 1 else ()))
    return (Operand(a, left), Operand(b, right)), out


def _matmul(node: Node, args: dict[str, Any]) -> Rule:
    a, b = [x for x in args.values() if isinstance(x, Node)][:2]
    term, out = _product(a, b, len(shape(node)))
    return Multilinear((term,), out)


def _addmm(node: Node, args: dict[str, Any]) -> Rule:
    a, b = (args["mat1"], args["mat2"]) if "mat1" in args else (args["batch1"], args["batch2"])
    term, out = _product(a, b, len(shape(node)))
    added = args["self"]
    lead = len(out) - len(shape(added))
    labels = tuple(out[d + lead] if size != 1 else None for d, size in enumerate(shape(added)))
    return Multilinear(((Operand(added, labels),), term), out)


def _grouped_mm(node: Node, args: dict[str, Any]) -> Rule:
    """The operator multiplies rows (t, k) in groups, each group by its own matrix of (e, k, n).

    The group of a row is an index, not a value.
    """
    names = ("self", "mat2") if "mat2" in args else ("input", "weight")
    rows, matrices = (args[n] for n in names)
    if len(shape(rows)) != 2 or len(shape(matrices)) != 3:
        return Opaque("a grouped product of other ranks than rows by one matrix per group")
    terms: list[tuple[Operand, ...]] = [(Operand(rows, (None, "k")), Operand(matrices, (None, "k", "n")))]
    if isinstance(args.get("bias"), Node):
        terms.append((Operand(args["bias"], (None, "n")),))
    groups = args["offs"]
    return Multilinear(tuple(terms), (None, "n"), (groups,) if isinstance(groups, Node) else ())


def _einsum(node: Node, args: dict[str, Any]) -> Rule:
    equation = args["equation"].replace(" ", "")
    operands, arrow, out = equation.partition("->")
    names = operands.split(",")
    if not arrow:
        single = sorted(c for c in set(operands) - {",", "."} if operands.count(c) == 1)
        out = "..." * ("..." in operands) + "".join(single)
    if "..." in equation:
        hidden = [len(shape(t)) - len(n.replace("...", "")) for t, n in zip(args["tensors"], names) if "..." in n]
        if len(set(hidden)) != 1:
            return Opaque(f"einsum {equation!r} broadcasts its implicit axes")
        axes = "".join(chr(0x100 + k) for k in range(hidden[0]))  # characters that no equation holds
        names, out = [n.replace("...", axes) for n in names], out.replace("...", axes)
    if any(len(set(n)) != len(n) for n in (*names, out)):
        return Opaque(f"einsum {equation!r} takes a diagonal")
    return Multilinear((tuple(Operand(t, tuple(n)) for t, n in zip(args["tensors"], names)),), tuple(out))


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
            return _selection(node, source, at[0], wrapped)
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


def _copy(node: Node, args: dict[str, Any]) -> Rule:
    if shape(args["src"]) != shape(node) or not is_float(args["src"]):
        return Opaque("a copy of values of another shape or type")
    return _identity(args["src"])


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


def _convolution(node: Node, args: dict[str, Any]) -> Rule:
    """y[b, o, …] = Σ W[o, i, …] x[b, i, …] + bias[o]: a linear layer along the channels at each place of the kernel."""
    x, weight, bias = args["input"], args["weight"], args.get("bias")
    if args.get("groups", 1) != 1 or args.get("transposed", False) or len(shape(weight)) != len(shape(x)):
        return Opaque("a convolution of groups of channels")
    places = (None,) * (len(shape(x)) - 2)
    terms: list[tuple[Operand, ...]] = [(Operand(x, (0, "i", *places)), Operand(weight, ("o", "i", *places)))]
    if isinstance(bias, Node):
        terms.append((Operand(bias, ("o",)),))
    return Multilinear(tuple(terms), (0, "o", *places))


def _addcmul(node: Node, args: dict[str, Any]) -> Rule:
    return _elementwise(node, [args["self"]], [args["tensor1"], args["tensor2"]])


def _slice_scatter(node: Node, args: dict[str, Any]) -> Rule:
    return _write_along(node, args, args["src"], {args["dim"] % len(shape(node))}, [])


def _reduce(node: Node, args: dict[str, Any]) -> Rule:
    """The operator sums over some axes, or takes their mean; the others pass."""
    source = args["self"]
    rank = len(shape(source))
    dims = args.get("dim")
    dims = (
        tuple(range(rank))
        if dims is None or dims == []
        else tuple(d % rank for d in ([dims] if isinstance(dims, int) else dims))
    )
    if op_name(node) == "aten::mean" and dims == (rank - 1,):
        return Mean(source, dims)
    labels = tuple(None if d in dims else d for d in range(rank))
    out = labels if args.get("keepdim") else tuple(label for label in labels if label is not None)
    return Multilinear(((Operand(source, labels),),), out)


def _cumsum(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(node))
    labels = tuple(None if d == args["dim"] % rank else d for d in range(rank))
    return Multilinear(((Operand(args["self"], labels),),), labels)


def _attention(node: Node, args: dict[str, Any]) -> Rule:
    """softmax(q·kᵀ)·v: the head axis of q and k is contracted, that of v passes."""
    q, k, v = args["query"], args["key"], args["value"]
    rank = len(shape(q))
    # not the heads of grouped queries
    shared = [d for d in range(rank - 2) if shape(q)[d] == shape(k)[d] == shape(v)[d]]
    batch: tuple[Label | None, ...] = tuple(d if d in shared else None for d in range(rank - 2))
    term = (Operand(q, (*batch, None, "d")), Operand(k, (*batch, None, "d")), Operand(v, (*batch, None, "e")))
    mask = [args.get("attn_mask"), args.get("attn_bias")]
    return Multilinear((term,), (*batch, None, "e"), tuple(m for m in mask if isinstance(m, Node)))


# -- norms -------------------------------------------------------------------------------------------------------------


def _last_axis_only(source: Node, normalized_shape: Sequence[int]) -> bool:
    return len(normalized_shape) == 1 and shape(source)[-1] == normalized_shape[0]


def _layer_norm(node: Node, args: dict[str, Any]) -> Rule:
    if not _last_axis_only(args["input"], args["normalized_shape"]):
        return Opaque("a norm over several axes")
    return Normalization(
        args["input"], args.get("weight"), args.get("bias"), args.get("eps"), "layer_norm" in op_name(node)
    )


def _native_norm(node: Node, args: dict[str, Any]) -> Rule:
    return _layer_norm(node, args)


def _vector_norm(node: Node, args: dict[str, Any]) -> Rule:
    order = args.get("ord", args.get("p"))
    rank = len(shape(args["self"]))
    dims = args.get("dim")
    if order not in (None, 2, 2.0) or dims is None:
        return Opaque("a norm that is not the 2-norm of an axis")
    return VectorNorm(args["self"], tuple(d % rank for d in ([dims] if isinstance(dims, int) else dims)))


def _full(node: Node, args: dict[str, Any]) -> Rule:
    return Zeros() if args.get("fill_value") == 0 else Ignored()


def _zeros(node: Node, args: dict[str, Any]) -> Rule:
    return Zeros()


def _shape_only(node: Node, args: dict[str, Any]) -> Rule:
    return Ignored()


def _table() -> dict[str, Callable[[Node, dict[str, Any]], Rule]]:
    """Return what builds the rule of a call, by the operator's name."""
    groups: list[tuple[Callable[[Node, dict[str, Any]], Rule], str]] = [
        (
            _same,
            "to _to_copy clone contiguous alias detach detach_ dropout native_dropout type_as lift_fresh_copy "
            "lift_fresh positive feature_dropout",
        ),
        (_negate, "neg neg_"),
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
        (_add, "add sub add_ sub_"),
        (_mul, "mul multiply mul_"),
        (_div, "div divide true_divide div_"),
        (_pow, "pow square"),
        (_where, "where"),
        (_masked_fill, "masked_fill"),
        (_linear, "linear"),
        (_matmul, "matmul mm bmm mv dot"),
        (_addmm, "addmm baddbmm"),
        (_einsum, "einsum"),
        (_stack, "stack"),
        (_grouped_mm, "_grouped_mm"),
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
        (_copy, "copy"),
        (_roll, "roll"),
        (_pad, "pad constant_pad_nd"),
        (_convolution, "conv1d conv2d conv3d convolution"),
        (_addcmul, "addcmul"),
        (_reduce, "sum mean"),
        (_cumsum, "cumsum"),
        (_attention, "scaled_dot_product_attention"),
        (_layer_norm, "layer_norm rms_norm"),
        (_vector_norm, "linalg_vector_norm norm"),
        (_full, "full full_like new_full fill"),
        (_zeros, "zeros zeros_like new_zeros zero"),
        (_shape_only, "ones_like empty_like rand_like randn_like new_ones new_empty empty ones"),
    ]
    table = {f"aten::{name}": builder for builder, names in groups for name in names.split()}
    return table | {"transformers::grouped_mm_fallback": _grouped_mm}


_EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to", "aten::repeat"}
_UNCHANGED = {f"aten::{n}" for n in ["to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"]}
_TABLE = _table()
_CONTRACTIONS = {_linear, _matmul, _addmm, _einsum, _grouped_mm, _convolution}
_CHECKS = {
    "aten::_assert_tensor_metadata",
    "aten::sym_size",
    "aten::sym_numel",
    "aten::sym_stride",
    "aten::_assert_scalar",
}
_SEVERAL = {
    "aten::split",
    "aten::split_with_sizes",
    "aten::chunk",
    "aten::unbind",
    "aten::unsafe_split",
    "aten::unsafe_chunk",
    "aten::native_layer_norm",
    "aten::_fused_rms_norm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
}
_NATIVE_NORMS = {"aten::native_layer_norm", "aten::_fused_rms_norm"}
_NATIVE_ATTENTION = {name for name in _SEVERAL if "attention" in name}


def tokens_per_call(inputs: Sequence[Node]) -> int:
    """Return how many tokens one call of the program processes, which is the elements of its first integer input.

    Axes of dynamic size count as 1.
    """
    for node in inputs:
        val = value(node)
        if isinstance(val, Tensor) and not val.is_floating_point() and val.ndim >= 1:
            return math.prod(s for s in shape(node) if isinstance(s, int)) or 1
    return 1

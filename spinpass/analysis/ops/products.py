"""Sums of products: written like an einsum, from which what passes and what cancels is derived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from spinpass.graph import arguments, is_op, op_name, shape

from .movements import same, source_through
from .reductions import REDUCTIONS
from .rules import Centring, Label, Mean, Multilinear, Opaque, Operand, Rule, Square, named
from .zeros import is_zero


def _aligned(operand: Node, out: Sequence[object]) -> Operand:
    """Return an operand that is broadcast to the result, with labels. The result's axes are labelled by their index."""
    sizes = shape(operand)
    lead = len(out) - len(sizes)
    return Operand(
        operand, tuple(d + lead if size != 1 or out[d + lead] == 1 else None for d, size in enumerate(sizes))
    )


def elementwise(node: Node, *terms: Sequence[Any], opaque: Sequence[Any] = ()) -> Rule:
    out = shape(node)
    products = tuple(tuple(_aligned(o, out) for o in term if isinstance(o, Node)) for term in terms)
    return Multilinear(products, tuple(range(len(out))), tuple(o for o in opaque if isinstance(o, Node)))


def _negate(node: Node, args: dict[str, Any]) -> Rule:
    return elementwise(node, [args["self"]])


def _add(node: Node, args: dict[str, Any]) -> Rule:
    if args["other"] == 0:
        return same(node, args)
    centring = _centring(node, args)
    return centring or elementwise(node, [args["self"]], [args["other"]])


def _centring(node: Node, args: dict[str, Any]) -> Rule | None:
    """x − mean(x): return its rule, also where the mean is cast in between, or None for other differences."""
    x, other = args["self"], args["other"]
    if op_name(node) not in ("aten::sub", "aten::sub_") or args.get("alpha", 1) != 1:
        return None
    if not isinstance(x, Node) or not isinstance(other, Node):
        return None
    behind = source_through(other)
    builder = REDUCTIONS.get(op_name(behind)) if is_op(behind) else None
    mean = None if builder is None else builder(behind, arguments(behind))
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
    return elementwise(node, [x, other])


def _div(node: Node, args: dict[str, Any]) -> Rule:
    if args.get("rounding_mode") is not None:
        return Opaque("a rounding division")
    return elementwise(node, [args["self"], args["other"]], opaque=[args["other"]])


def _pow(node: Node, args: dict[str, Any]) -> Rule:
    if args.get("exponent", 2) == 2:
        return Square(args["self"])
    return Opaque("aten::pow does not commute with a rotation")


def _where(node: Node, args: dict[str, Any]) -> Rule:
    condition = args["condition"]
    values = [v for v in (args["self"], args["other"]) if not is_zero(v)]
    return elementwise(node, *([condition, v] for v in values), opaque=[condition])


def _masked_fill(node: Node, args: dict[str, Any]) -> Rule:
    terms = [[args["mask"], args["self"]]] + ([] if args["value"] == 0 else [[args["mask"], args["value"]]])
    return elementwise(node, *terms, opaque=[args["mask"]])


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


def grouped_mm(node: Node, args: dict[str, Any]) -> Rule:
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


def _addcmul(node: Node, args: dict[str, Any]) -> Rule:
    return elementwise(node, [args["self"]], [args["tensor1"], args["tensor2"]])


def _cumsum(node: Node, args: dict[str, Any]) -> Rule:
    rank = len(shape(node))
    labels = tuple(None if d == args["dim"] % rank else d for d in range(rank))
    return Multilinear(((Operand(args["self"], labels),),), labels)


def attention(node: Node, args: dict[str, Any]) -> Rule:
    """softmax(q·kᵀ)·v: the head axis of q and k is contracted, that of v passes."""
    q, k, v = args["query"], args["key"], args["value"]
    rank = len(shape(q))
    # not the heads of grouped queries
    shared = [d for d in range(rank - 2) if shape(q)[d] == shape(k)[d] == shape(v)[d]]
    batch: tuple[Label | None, ...] = tuple(d if d in shared else None for d in range(rank - 2))
    term = (Operand(q, (*batch, None, "d")), Operand(k, (*batch, None, "d")), Operand(v, (*batch, None, "e")))
    mask = [args.get("attn_mask"), args.get("attn_bias")]
    return Multilinear((term,), (*batch, None, "e"), tuple(m for m in mask if isinstance(m, Node)))


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


PRODUCTS = named(
    [
        (_negate, "neg neg_"),
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
        (grouped_mm, "_grouped_mm"),
        (_addcmul, "addcmul"),
        (_cumsum, "cumsum"),
        (attention, "scaled_dot_product_attention"),
        (_convolution, "conv1d conv2d conv3d convolution"),
    ]
)
"""The sums of products."""

CONTRACTIONS = {
    f"aten::{n}"
    for n in (
        *("linear", "matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "einsum", "_grouped_mm"),
        *("conv1d", "conv2d", "conv3d", "convolution"),
    )
}
"""Those that may contract two operands."""

"""Sums of products: written like an einsum, from which what passes and what cancels is derived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from spinpass.graph import is_op, op_name, shape

from .calls import Call, answer, named
from .movements import same, source_through
from .reductions import REDUCTIONS
from .rules import Centring, Label, Mean, Multilinear, Opaque, Operand, Rule, Square
from .zeros import is_zero


def _aligned(operand: Node, out: Sequence[object]) -> Operand:
    """Return an operand that is broadcast to the result, with labels. The result's axes are labelled by their index."""
    sizes = shape(operand)
    lead = len(out) - len(sizes)
    return Operand(
        operand, tuple(d + lead if size != 1 or out[d + lead] == 1 else None for d, size in enumerate(sizes))
    )


def elementwise(call: Call, *terms: Sequence[Any], opaque: Sequence[Any] = ()) -> Rule:
    """Return the rule of a sum of products element by element, its operands broadcast to the result.

    What is no tensor counts as a number.
    """
    out = shape(call.node)
    products = tuple(tuple(_aligned(o, out) for o in term if isinstance(o, Node)) for term in terms)
    return Multilinear(products, tuple(range(len(out))), tuple(o for o in opaque if isinstance(o, Node)))


def _negate(call: Call) -> Rule:
    return elementwise(call, [call["self"]])


def _add(call: Call) -> Rule:
    if call["other"] == 0:
        call.account("alpha")
        return same(call)
    centring = _centring(call)
    call.account("alpha")  # which scales all channels of one term
    return centring or elementwise(call, [call["self"]], [call["other"]])


def _centring(call: Call) -> Rule | None:
    """x − mean(x): return its rule, also where the mean is cast in between, or None for other differences."""
    x, other = call["self"], call["other"]
    if call.name not in ("aten::sub", "aten::sub_") or call.get("alpha", 1) != 1:
        return None
    if not isinstance(x, Node) or not isinstance(other, Node):
        return None
    behind = source_through(other)
    builder = REDUCTIONS.get(op_name(behind)) if is_op(behind) else None
    mean = None if builder is None else answer(builder, Call(behind))
    if (
        isinstance(mean, Mean)
        and source_through(mean.source) is source_through(x)
        and len(shape(other)) == len(shape(x))
    ):
        return Centring(x, source_through(other), mean.dims)
    return None


def _mul(call: Call) -> Rule:
    x, other = call["self"], call["other"]
    if x is other:
        return Square(x)
    return elementwise(call, [x, other])


def _div(call: Call) -> Rule:
    if call.get("rounding_mode") is not None:
        return Opaque("a rounding division")
    return elementwise(call, [call["self"], call["other"]], opaque=[call["other"]])


def _pow(call: Call) -> Rule:
    if call.get("exponent", 2) == 2:
        return Square(call["self"])
    return Opaque("aten::pow does not commute with a rotation")


def _where(call: Call) -> Rule:
    condition = call["condition"]
    values = []
    for name in ("self", "other"):
        if is_zero(call[name]):
            call.account(name)
        else:
            values.append(call[name])
    return elementwise(call, *([condition, v] for v in values), opaque=[condition])


def _masked_fill(call: Call) -> Rule:
    terms = [[call["mask"], call["self"]]]
    if is_zero(call["value"]):
        call.account("value")
    else:
        terms.append([call["mask"], call["value"]])
    return elementwise(call, *terms, opaque=[call["mask"]])


def _linear(call: Call) -> Rule:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    batch = tuple(range(len(shape(x)) - 1))
    if len(shape(weight)) != 2:
        return Opaque("a linear layer whose weight is no matrix")
    terms: list[tuple[Operand, ...]] = [(Operand(x, (*batch, "i")), Operand(weight, ("o", "i")))]
    if bias is not None:
        terms.append((_added(bias, (*batch, "o"), shape(call.node)),))
    return Multilinear(tuple(terms), (*batch, "o"))


def _added(operand: Node, out: Sequence[Label], sizes: Sequence[object]) -> Operand:
    """Return a summand that is broadcast to a result of those labels and sizes."""
    lead = len(out) - len(shape(operand))
    labels = (out[d + lead] if size != 1 or sizes[d + lead] == 1 else None for d, size in enumerate(shape(operand)))
    return Operand(operand, tuple(labels))


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


def _matmul(call: Call) -> Rule:
    second = next(n for n in ("other", "mat2", "vec", "tensor") if n in call)
    term, out = _product(call["self"], call[second], len(shape(call.node)))
    return Multilinear((term,), out)


def _addmm(call: Call) -> Rule:
    a, b = (call["mat1"], call["mat2"]) if "mat1" in call else (call["batch1"], call["batch2"])
    call.account("alpha", "beta")  # which scale all channels of one term
    term, out = _product(a, b, len(shape(call.node)))
    return Multilinear(((_added(call["self"], out, shape(call.node)),), term), out)


def grouped_mm(call: Call) -> Rule:
    """The operator multiplies rows (t, k) in groups, each group by its own matrix of (e, k, n).

    The group of a row is an index, not a value.
    """
    names = ("self", "mat2") if "mat2" in call else ("input", "weight")
    rows, matrices = (call[n] for n in names)
    if len(shape(rows)) != 2 or len(shape(matrices)) != 3:
        return Opaque("a grouped product of other ranks than rows by one matrix per group")
    terms: list[tuple[Operand, ...]] = [(Operand(rows, (None, "k")), Operand(matrices, (None, "k", "n")))]
    if isinstance(call.get("bias"), Node):
        terms.append((Operand(call["bias"], (None, "n")),))
    groups = call["offs"]
    return Multilinear(tuple(terms), (None, "n"), (groups,) if isinstance(groups, Node) else ())


def _einsum(call: Call) -> Rule:
    equation = call["equation"].replace(" ", "")
    operands, arrow, out = equation.partition("->")
    names = operands.split(",")
    if not arrow:
        single = sorted(c for c in set(operands) - {",", "."} if operands.count(c) == 1)
        out = "..." * ("..." in operands) + "".join(single)
    if "..." in equation:
        hidden = [len(shape(t)) - len(n.replace("...", "")) for t, n in zip(call["tensors"], names) if "..." in n]
        if len(set(hidden)) != 1:
            return Opaque(f"einsum {equation!r} broadcasts its implicit axes")
        axes = "".join(chr(0x100 + k) for k in range(hidden[0]))  # characters that no equation holds
        names, out = [n.replace("...", axes) for n in names], out.replace("...", axes)
    if any(len(set(n)) != len(n) for n in (*names, out)):
        return Opaque(f"einsum {equation!r} takes a diagonal")
    sizes: dict[str, set[object]] = {}
    for operand, name in zip(call["tensors"], names):
        for label, size in zip(name, shape(operand)):
            sizes.setdefault(label, set()).add(size)
    broadcast = {label for label, found in sizes.items() if len(found) > 1}  # an axis of length 1 goes with all others

    def labelled(operand: Node, name: str) -> Operand:
        axes = zip(name, shape(operand), strict=True)
        return Operand(operand, tuple(None if d in broadcast and size == 1 else d for d, size in axes))

    return Multilinear((tuple(map(labelled, call["tensors"], names)),), tuple(out))


def _addcmul(call: Call) -> Rule:
    call.account("value")  # which scales all channels of one term
    return elementwise(call, [call["self"]], [call["tensor1"], call["tensor2"]])


def _cumsum(call: Call) -> Rule:
    rank = len(shape(call.node))
    dim = call.axis("dim", rank)
    labels = tuple(None if d == dim else d for d in range(rank))
    return Multilinear(((Operand(call["self"], labels),),), labels)


def attention(call: Call) -> Rule:
    """softmax(q·kᵀ)·v: the head axis of q and k is contracted, that of v passes."""
    q, k, v = call["query"], call["key"], call["value"]
    if call["dropout_p"] != 0:
        return Opaque("attention with active dropout")
    call.account("is_causal", "scale", "enable_gqa")  # which change the weights of the tokens alone
    call.account("return_debug_mask", "compute_log_sumexp")  # which are further results
    rank = len(shape(q))
    if rank < 2 or len(shape(k)) != rank or len(shape(v)) != rank:
        return Opaque("attention of operands of different ranks")
    # not the heads of grouped queries
    shared = [d for d in range(rank - 2) if shape(q)[d] == shape(k)[d] == shape(v)[d]]
    batch: tuple[Label | None, ...] = tuple(d if d in shared else None for d in range(rank - 2))
    term = (Operand(q, (*batch, None, "d")), Operand(k, (*batch, None, "d")), Operand(v, (*batch, None, "e")))
    mask = [call.get("attn_mask"), call.get("attn_bias")]
    return Multilinear((term,), (*batch, None, "e"), tuple(m for m in mask if isinstance(m, Node)))


def _convolution(call: Call) -> Rule:
    """y[b, o, …] = Σ W[o, i, …] x[b, i, …] + bias[o]: a linear layer along the channels at each place of the kernel."""
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    if call.get("groups", 1) != 1 or call.get("transposed", False) or len(shape(weight)) != len(shape(x)):
        return Opaque("a convolution of groups of channels")
    call.account("stride", "padding", "dilation", "output_padding")  # which say the places of the kernel
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

"""Attention with a KV cache as the ONNX graph spells it, from its Softmax outwards.

    softmax(cap(s · q Kᵀ) + mask) V,   K = Concat(past key, k),  V = Concat(past value, v), heads repeated for groups

Everything the match needs to know is read from the graph: what multiplies q and K on the way to the scores, what is
added to them, which input each cache continues. What is spelled otherwise is no match, and the reason says what is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .match import constant, integer, integers, made_by, names, number, only_user, sizes, static, with_number


class NoMatchError(Exception):
    """It says why a Softmax is not the attention that is looked for."""


@dataclass(frozen=True)
class Cached:
    """This is what a cache becomes: ``past`` (batch, heads, past, size), an input of the graph, and ``new`` (batch,
    heads, tokens, size), are joined in ``present``, an output."""

    past: ir.Value
    new: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class CachedAttention:
    """This is a match: ``query`` is (batch, heads, tokens, size), and ``weighted`` what comes out, in the same layout.
    ``bias`` is added to the scores, None where nothing is; ``cap`` is 0 where the scores are not capped."""

    query: ir.Value
    key: Cached
    value: Cached
    scale: float
    cap: float
    bias: ir.Value | None
    weighted: ir.Value


def match_attention(softmax: ir.Node) -> CachedAttention:
    """Return the attention around a Softmax. Raises NoMatchError where it is something else."""
    scores = _scores(softmax.inputs[0])
    weighted, values = _weighted(softmax.outputs[0])
    query, before = _scaled(scores.product.inputs[0])
    keys, beside = _scaled(scores.product.inputs[1])
    heads, size = static(query, 1), static(query, -1)
    if heads is None or size is None or len(sizes(query)) != 4:
        raise NoMatchError("its queries are not of the shape (batch, heads, tokens, size) with known heads and size")
    keys, more = _scaled(_transposed(keys))
    key, value = _cached(_ungrouped(keys, heads), "keys"), _cached(_ungrouped(values, heads), "values")
    if static(value.new, -1) != size or static(value.new, 1) != static(key.new, 1):
        raise NoMatchError("its values are of another size than its keys")
    scale = scores.scale * before * beside * more
    return CachedAttention(query, key, value, scale, scores.cap, scores.bias, weighted)


@dataclass(frozen=True)
class _Scores:
    """This is the product of queries and keys, and what happens to it before the Softmax."""

    product: ir.Node
    scale: float = 1.0
    cap: float = 0.0
    bias: ir.Value | None = None


def _scores(value: ir.Value | None) -> _Scores:
    node = made_by(value, "Add", "Mul", "Div", "MatMul", "Cast")
    if node is None:
        raise NoMatchError(f"its scores come out of {_op(value)}")
    if node.op_type == "MatMul":
        return _Scores(node)
    if node.op_type == "Cast":
        if node.inputs[0] is None or node.inputs[0].dtype != node.outputs[0].dtype:
            raise NoMatchError("its scores change their type before the Softmax")
        return _scores(node.inputs[0])
    if node.op_type == "Add":
        return _masked(node)
    cap = _cap(node)
    if cap is not None:
        inner = _scores(cap[0])
        _require_bare(inner)
        return _Scores(inner.product, inner.scale, cap[1])
    found = with_number(node)
    if found is None or (node.op_type == "Div" and found[0] is not node.inputs[0]):
        raise NoMatchError(f"its scores come out of a {node.op_type} of two values")
    inner = _scores(found[0])
    _require_bare(inner)
    return _Scores(inner.product, inner.scale * found[1] if node.op_type == "Mul" else inner.scale / found[1])


def _masked(node: ir.Node) -> _Scores:
    """Match scores plus a mask: the operand that leads to no product of queries and keys is the mask."""
    reasons = []
    for scores, bias in (tuple(node.inputs), tuple(reversed(node.inputs))):
        try:
            inner = _scores(scores)
        except NoMatchError as error:
            reasons.append(error)
            continue
        if inner.bias is not None:
            raise NoMatchError("two values are added to its scores")
        return _Scores(inner.product, inner.scale, inner.cap, bias)
    raise reasons[0]


def _require_bare(inner: _Scores) -> None:
    if inner.bias is not None or inner.cap:
        raise NoMatchError("its scores are scaled after they were masked or capped")


def _cap(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return (x, c) of c · Tanh(x / c)."""
    outer = with_number(node) if node.op_type == "Mul" else None
    tanh = made_by(None if outer is None else outer[0], "Tanh")
    divided = made_by(None if tanh is None else tanh.inputs[0], "Div", "Mul")
    inner = None if divided is None else with_number(divided)
    if outer is None or inner is None or divided is None:
        return None
    c = inner[1] if divided.op_type == "Div" else 1 / inner[1]
    return (inner[0], c) if abs(c - outer[1]) <= 1e-6 * abs(c) else None


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """Return (x, c) where ``value`` is c·x with a number c; (value, 1) where it is not."""
    assert value is not None
    node = made_by(value, "Mul", "Div")
    found = None if node is None else with_number(node)
    if node is None or found is None or (node.op_type == "Div" and found[0] is not node.inputs[0]):
        return value, 1.0
    x, c = _scaled(found[0])
    return x, c * found[1] if node.op_type == "Mul" else c / found[1]


def _transposed(value: ir.Value) -> ir.Value:
    """Return K of Kᵀ: of a Transpose, or of one between two Reshapes that merge batch and heads and part them again."""
    node = made_by(value, "Transpose")
    if node is not None and integers(node, "perm") == [0, 1, 3, 2] and node.inputs[0] is not None:
        return node.inputs[0]
    outer = made_by(value, "Reshape")
    middle = made_by(None if outer is None else outer.inputs[0], "Transpose")
    inner = made_by(None if middle is None else middle.inputs[0], "Reshape")
    if middle is None or inner is None or integers(middle, "perm") != [0, 2, 1] or inner.inputs[0] is None:
        raise NoMatchError(f"the product of its scores is not with transposed keys but with {_op(value)}")
    return inner.inputs[0]


def _weighted(weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the weighted sum and the values; a guard against rows of nothing is looked through."""
    users = list(weights.consumers())
    guards = [node for node in users if node.op_type == "IsNaN"]
    if guards:
        where = only_user(guards[0].outputs[0], "Where")
        if where is None or len(users) != 2 or where.inputs[2] is not weights or number(where.inputs[1]) != 0:
            raise NoMatchError("what becomes of its weights is not a weighted sum")
        weights = where.outputs[0]
    product = only_user(weights, "MatMul")
    if product is None or product.inputs[0] is not weights or product.inputs[1] is None:
        raise NoMatchError("what becomes of its weights is not a weighted sum")
    return product.outputs[0], product.inputs[1]


def _ungrouped(value: ir.Value, heads: int) -> ir.Value:
    """Return x (batch, kv heads, length, size) where ``value`` repeats each of its heads for a group of queries."""
    merged = made_by(value, "Reshape")
    repeated = made_by(None if merged is None else merged.inputs[0], "Expand")
    split = made_by(None if repeated is None else repeated.inputs[0], "Unsqueeze")
    if split is None or repeated is None:
        return value
    axes, x = constant(split.inputs[1]), split.inputs[0]
    if axes is None or axes.tolist() != [2] or len(sizes(x)) != 4 or static(value, 1) != heads or x is None:
        raise NoMatchError("its heads are repeated in another order than in groups")
    return x


def _cached(value: ir.Value, what: str) -> Cached:
    """Return the parts of Concat(past, new) along the tokens."""
    node = made_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or integer(node, "axis", 0) not in (-2, 2):
        raise NoMatchError(f"its {what} come out of {_op(value)}, not of a cache that new tokens are appended to")
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input() or not value.is_graph_output():
        raise NoMatchError(f"the cache of its {what} does not go in and out of the graph")
    if len(sizes(past)) != 4 or not isinstance(names(sizes(past))[2], str):
        raise NoMatchError(f"the cache of its {what} has no dynamic length on its third axis")
    return Cached(past, new, value)


def _op(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "an input" if node is None else f"{node.domain}::{node.op_type}".removeprefix("::")

"""Sums, means and norms over some axes."""

from __future__ import annotations

from spinpass.graph import shape

from .calls import Call, named
from .rules import Mean, Multilinear, Normalization, Opaque, Operand, Rule, VectorNorm


def _reduce(call: Call) -> Rule:
    """The operator sums over some axes, or takes their mean; the others pass."""
    source = call["self"]
    rank = len(shape(source))
    dims, keeps = call.axes("dim", rank), call.get("keepdim")
    if call.name == "aten::mean" and dims == (rank - 1,):
        return Mean(source, dims)
    labels = tuple(None if d in dims else d for d in range(rank))
    out = labels if keeps else tuple(label for label in labels if label is not None)
    return Multilinear(((Operand(source, labels),),), out)


def layer_norm(call: Call) -> Rule:
    """layer_norm or rms_norm, also as an operator that returns its statistics besides."""
    source, over = call["input"], call["normalized_shape"]
    weight, bias, eps = call.get("weight"), call.get("bias"), call["eps"]
    if len(over) != 1 or shape(source)[-1] != over[0]:
        return Opaque("a norm over several axes")
    return Normalization(source, weight, bias, eps, "layer_norm" in call.name)


def _vector_norm(call: Call) -> Rule:
    order, dims = call["ord" if "ord" in call else "p"], call.get("dim")
    call.account("keepdim")  # no axis of the vectors is left
    if order not in (None, 2, 2.0) or dims is None or not shape(call["self"]):
        return Opaque("a norm that is not the 2-norm of an axis")
    return VectorNorm(call["self"], call.axes("dim", len(shape(call["self"]))))


REDUCTIONS = named(
    [
        (_reduce, "sum mean"),
        (layer_norm, "layer_norm rms_norm"),
        (_vector_norm, "linalg_vector_norm norm"),
    ]
)
"""The reductions."""

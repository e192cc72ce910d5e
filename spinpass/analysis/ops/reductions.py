"""Sums, means and norms over some axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from spinpass.graph import op_name, shape

from .rules import Mean, Multilinear, Normalization, Opaque, Operand, Rule, VectorNorm, named


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


def _last_axis_only(source: Node, normalized_shape: Sequence[int]) -> bool:
    return len(normalized_shape) == 1 and shape(source)[-1] == normalized_shape[0]


def _layer_norm(node: Node, args: dict[str, Any]) -> Rule:
    if not _last_axis_only(args["input"], args["normalized_shape"]):
        return Opaque("a norm over several axes")
    return Normalization(
        args["input"], args.get("weight"), args.get("bias"), args.get("eps"), "layer_norm" in op_name(node)
    )


def native_norm(node: Node, args: dict[str, Any]) -> Rule:
    return _layer_norm(node, args)


def _vector_norm(node: Node, args: dict[str, Any]) -> Rule:
    order = args.get("ord", args.get("p"))
    rank = len(shape(args["self"]))
    dims = args.get("dim")
    if order not in (None, 2, 2.0) or dims is None:
        return Opaque("a norm that is not the 2-norm of an axis")
    return VectorNorm(args["self"], tuple(d % rank for d in ([dims] if isinstance(dims, int) else dims)))


REDUCTIONS = named(
    [
        (_reduce, "sum mean"),
        (_layer_norm, "layer_norm rms_norm"),
        (_vector_norm, "linalg_vector_norm norm"),
    ]
)
"""The reductions."""

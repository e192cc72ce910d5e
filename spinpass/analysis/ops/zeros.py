"""Operators that make values of a shape and read none: zeros, which are the same in every basis, and others."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from spinpass.graph import arguments, is_op, op_name, shape

from .rules import Ignored, Rule, Zeros, named


def is_zero(value: Any) -> bool:
    """Return whether the value is the number zero, or one made by the program."""
    if not isinstance(value, Node):
        return bool(value == 0)
    builder = MAKERS.get(op_name(value)) if is_op(value) else None
    return builder is not None and set(shape(value)) <= {1} and isinstance(builder(value, arguments(value)), Zeros)


def _full(node: Node, args: dict[str, Any]) -> Rule:
    return Zeros() if args.get("fill_value") == 0 else Ignored()


def _zeros(node: Node, args: dict[str, Any]) -> Rule:
    return Zeros()


def _shape_only(node: Node, args: dict[str, Any]) -> Rule:
    return Ignored()


MAKERS = named(
    [
        (_full, "full full_like new_full fill"),
        (_zeros, "zeros zeros_like new_zeros zero"),
        (_shape_only, "ones_like empty_like rand_like randn_like new_ones new_empty empty ones"),
    ]
)
"""The operators that make values from a shape alone."""

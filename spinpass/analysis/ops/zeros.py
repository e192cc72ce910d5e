"""Operators that make values of a shape and read none: zeros, which are the same in every basis, and others."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from spinpass.graph import is_op, op_name, shape

from .calls import Call, answer, named
from .rules import Ignored, Rule, Zeros


def is_zero(given: Any) -> bool:
    """Return whether the value is the number zero, or one made by the program."""
    if not isinstance(given, Node):
        return bool(given == 0)
    builder = MAKERS.get(op_name(given)) if is_op(given) else None
    return builder is not None and set(shape(given)) <= {1} and isinstance(answer(builder, Call(given)), Zeros)


def _full(call: Call) -> Rule:
    name = "fill_value" if "fill_value" in call else "value"
    if isinstance(call[name], Node) and shape(call[name]) == ():
        call.leave_out(call[name])  # one number for all elements
    return _made(call, is_zero(call[name]))


def _zeros(call: Call) -> Rule:
    return _made(call, zero=True)


def _shape_only(call: Call) -> Rule:
    return _made(call, zero=False)


def _made(call: Call, zero: bool) -> Rule:
    """Return the rule of an operator to which only the shape of a tensor matters."""
    call.account("self", "size", "layout", "generator")
    return Zeros() if zero else Ignored()


MAKERS = named(
    [
        (_full, "full full_like new_full fill"),
        (_zeros, "zeros zeros_like new_zeros zero"),
        (_shape_only, "ones_like empty_like rand_like randn_like new_ones new_empty empty ones"),
    ]
)
"""The operators that make values from a shape alone."""

"""Operators that make values of a shape and read none: zeros, which are the same in every basis, and others."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass.graph import called, is_op, is_random, op_name, shape, value

from .calls import Call, answer, named
from .rules import Ignored, Rule, Zeros


def is_zero(given: Any) -> bool:
    """Return whether the value is the number zero, or one made by the program."""
    if not isinstance(given, Node):
        return bool(given == 0)
    builder = MAKERS.get(op_name(given)) if is_op(given) else None
    return builder is not None and set(shape(given)) <= {1} and isinstance(answer(builder, Call(given)), Zeros)


def made_of_numbers(node: Node, steps: int = 8) -> Tensor | None:
    """Return what a node holds that is made of numbers alone, such as ``ones(8, 1) / 8``, on the CPU; None for others.

    Large values are not made, nor what takes more than so many operators one after the other.
    """
    if not steps or not is_op(node) or not isinstance(value(node), Tensor) or is_random(node):
        return None
    sizes = [size for size in shape(node) if isinstance(size, int)]
    if len(sizes) < len(shape(node)) or math.prod(sizes) > _LARGEST:
        return None
    made = {operand: made_of_numbers(operand, steps - 1) for operand in node.all_input_nodes}
    if any(each is None for each in made.values()):
        return None
    found = called(node, *map_arg((node.args, dict(node.kwargs)), made.get))
    return found if isinstance(found, Tensor) else None


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


_LARGEST = 1 << 16
MAKERS = named(
    [
        (_full, "full full_like new_full fill"),
        (_zeros, "zeros zeros_like new_zeros zero"),
        (_shape_only, "ones_like empty_like rand_like randn_like new_ones new_empty empty ones"),
    ]
)
"""The operators that make values from a shape alone."""

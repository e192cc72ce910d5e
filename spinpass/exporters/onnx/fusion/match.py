"""Reading an ``onnx_ir`` graph backwards: who made a value, which number it is, which values meet in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

AxisSize = int | ir.SymbolicDim


def made_by(value: ir.Value | None, *ops: str, domain: str = "") -> ir.Node | None:
    """Return the node behind ``value`` if it is one of the operators ``ops``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in ops and node.domain == domain else None


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the array of an initializer or of a Constant; None for a computed value."""
    found = None if value is None else ir.convenience.get_const_tensor(value)
    return None if found is None else np.asarray(found.numpy())


def number(value: ir.Value | None) -> float | None:
    """Return the one number that a constant holds; None for anything else."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def with_number(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return (x, c) of a binary operator of a value and a number, in either order."""
    a, b = node.inputs
    for value, other in ((a, b), (b, a)):
        c = number(other)
        if c is not None and value is not None and number(value) is None:
            return value, c
    return None


def integers(node: ir.Node, name: str) -> list[int] | None:
    """Return the integers of an attribute; None where the node has not got it."""
    found = node.attributes.get(name)
    return None if found is None else list(found.as_ints())


def integer(node: ir.Node, name: str, default: int) -> int:
    """Return the integer of an attribute, or what it is by default."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def sizes(value: ir.Value | None) -> Sequence[AxisSize]:
    """Return the shape of a value; it is empty where it is not known."""
    return () if value is None or value.shape is None else tuple(value.shape)


def names(shape: Sequence[AxisSize]) -> list[int | str | None]:
    """Return sizes as numbers and symbols; None for what is not known."""
    return [size if isinstance(size, int) else size.value for size in shape]


def static(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of an axis where it is a number."""
    shape = sizes(value)
    size = shape[axis] if -len(shape) <= axis < len(shape) else None
    return size if isinstance(size, int) else None


def only_user(value: ir.Value, op: str) -> ir.Node | None:
    """Return the node that alone reads ``value``, if it is such an operator and the value is no output."""
    users = list(value.consumers())
    if len(users) != 1 or value.is_graph_output() or users[0].op_type != op or users[0].domain != "":
        return None
    return users[0]

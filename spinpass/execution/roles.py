"""What an integer input of a program is for, read off its uses: ids, positions, a mask."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.graph import arguments, is_float, is_op, mutates, op_name, shape, value

from .interpreter import origin


class InputRole(enum.Enum):
    """What an integer input is for."""

    LOOKUP = "looked up in a table of ``bound`` rows"
    POSITION = "a position: written to, or multiplied as a number"
    MASK = "compared, summed or turned into a boolean"
    OTHER = "none of these"


_TABLES = {"aten::embedding": "weight", "aten::index": "self", "aten::index_select": "self", "aten::gather": "self"}
_WRITES = {
    "aten::index_copy": "index",
    "aten::index_put": "indices",
    "aten::scatter": "index",
    "aten::index_add": "index",
}
_COMPARISONS = frozenset({"aten::eq", "aten::ne", "aten::lt", "aten::le", "aten::gt", "aten::ge", "aten::logical_not",
                          "aten::logical_and", "aten::bitwise_and", "aten::__and__", "aten::cumsum", "aten::sum",
                          "aten::rsub", "aten::where", "aten::masked_fill"})  # fmt: skip
_PRODUCTS = frozenset({"aten::mul", "aten::matmul", "aten::bmm", "aten::mm", "aten::einsum", "aten::outer"})


def role_of(node: Node) -> tuple[InputRole, int | None]:
    """Return the role of an integer placeholder by the strongest of its uses, and the size of the axis it indexes.

    Of several axes the smallest counts. The size is None where the placeholder indexes no axis of known size.
    """
    uses = list(_uses(node))
    rows = [n for n in (_rows(user, via) for user, via in uses) if n is not None]
    places = [n for n in (_places(user, via) for user, via in _shifted_uses(node)) if n is not None]
    if places:
        return InputRole.POSITION, min((n for n in places + rows if n), default=None)
    if rows:
        return InputRole.LOOKUP, min(rows)
    if any(_base(user) in _PRODUCTS and is_float(via) for user, via in uses):
        return InputRole.POSITION, None
    if any(_base(user) in _COMPARISONS or _is_bool(user) for user, _ in uses):
        return InputRole.MASK, None
    return InputRole.OTHER, None


def _uses(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield (user, the node through which it reads) for every use of the placeholder, through views and casts."""
    stack, seen = [node], {node}
    while stack:
        via = stack.pop()
        for user in via.users:
            yield user, via
            if user not in seen and origin(user) is node:
                seen.add(user)
                stack.append(user)


def _shifted_uses(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield the same, also where the value was added to something or copied into a buffer before.

    Such a value is a start, and what is read are the places from there on.
    """
    stack, seen = [node], {node}
    while stack:
        for user, via in _uses(stack.pop()):
            yield user, via
            for carrier in _carriers(user, via):
                if carrier not in seen:
                    seen.add(carrier)
                    stack.append(carrier)


def _carriers(user: Node, via: Node) -> list[Node]:
    """Return the nodes that hold the integers of ``via`` behind ``user``: a sum with them, or a copy of them."""
    if is_float(user):
        return []
    if _base(user) == "aten::add":
        return [user]
    if _base(user) != "aten::copy" or arguments(user)["src"] is not via:
        return []
    return [user, origin(arguments(user)["self"])] if mutates(user) else [user]


def _base(node: Node) -> str:
    return op_name(node).removesuffix("_")


def _is_bool(node: Node) -> bool:
    val = value(node)
    return isinstance(val, Tensor) and val.dtype is torch.bool


def _rows(user: Node, via: Node) -> int | None:
    """Return the rows of the table that ``user`` looks ``via`` up in, 1 where they are dynamic; None for no lookup."""
    table = _TABLES.get(_base(user))
    if table is None or not is_op(user):
        return None
    args = arguments(user)
    source = args[table]
    if source is via or not isinstance(source, Node):
        return None
    axis = list(args["indices"]).index(via) if _base(user) == "aten::index" else args.get("dim", 0)
    rows = shape(source)[axis]
    return rows if isinstance(rows, int) else 1


def _places(user: Node, via: Node) -> int | None:
    """Return the places on the axis that ``user`` writes to at ``via``, 0 where they are dynamic; None for no write."""
    index = _WRITES.get(_base(user))
    if index is None or not is_op(user):
        return None
    args = arguments(user)
    at = args[index]
    if at is via:
        axis = args["dim"]
    elif isinstance(at, list | tuple) and via in at:
        axis = list(at).index(via)
    else:
        return None
    places = shape(args["self"])[axis]
    return places if isinstance(places, int) else 0

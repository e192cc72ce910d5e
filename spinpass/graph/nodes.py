"""What a node of an exported graph is: its operator, its arguments by name, the size and the kind of its value."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .layout import Size

_T = TypeVar("_T")
KNOWN = "spinpass_known"  # in a node's meta: the value of a small lifted index tensor


def is_op(node: Node) -> bool:
    """Return whether the node calls an operator of torch, and not ``getitem`` or a builtin on symbolic sizes."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def is_region(node: Node) -> bool:
    """Return whether the node runs a graph of its own: a loop, a branch, or a stretch under other settings of torch."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def is_context(node: Node) -> bool:
    """Return whether the node runs a graph, or begins or ends a stretch of this one, under other settings of torch.

    Such are autocast and no_grad, and what vmap leaves behind. They are gone once torch has traced through them.
    """
    if node.op != "call_function" or is_op(node):
        return False
    wraps = is_region(node) and op_name(node) in _CONTEXTS
    return wraps or getattr(node.target, "__module__", "").startswith("torch._functorch")


def op_name(node: Node) -> str:
    """Return the name of what the node calls: ``aten::linear``, or ``getitem`` for a builtin.

    A node that calls nothing gives its kind, for example ``placeholder``.
    """
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    return getattr(node.target, "__name__", None) or str(node.target)


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of an operator call by the names of its schema, defaults filled in."""
    bound = dict(_defaults(node.target))
    bound.update(zip(bound, node.args))
    bound.update(node.kwargs)
    return bound


def differing(node: Node) -> dict[str, Any]:
    """Return those arguments of an operator call that are not what its schema has for default, by name."""
    defaults = _defaults(node.target)
    return {
        name: given
        for name, given in (*zip(defaults, node.args), *node.kwargs.items())
        if isinstance(given, Node) or given != defaults[name]
    }


@cache
def _defaults(target: Any) -> dict[str, Any]:
    """Return what the schema of an operator has for default, by the names of its arguments; None where it has none."""
    assert isinstance(target, torch._ops.OpOverload)
    return {a.name: a.default_value for a in target._schema.arguments}


def frozen(argument: Any, operand: Callable[[Node], Hashable]) -> Hashable:
    """Return an argument of a call as part of a key. ``operand`` gives what stands in it for a node."""
    if isinstance(argument, Node):
        return ("operand", operand(argument))
    if isinstance(argument, (list, tuple)):
        return tuple(frozen(each, operand) for each in argument)
    if isinstance(argument, dict):
        return tuple((key, frozen(each, operand)) for key, each in argument.items())
    return repr(argument)  # 1, 1.0 and True are equal, and not the same argument


def is_composed(node: Node) -> bool:
    """Return whether the node is an operator that torch composes of others, which may be a view without saying so."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target.name()  # type: ignore[no-untyped-call]
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


def mutates(node: Node) -> bool:
    """Return whether the node is an operator that writes into one of its arguments."""
    return is_op(node) and node.target._schema.is_mutable  # type: ignore[union-attr]


def functional_target(node: Node) -> Any:
    """Return the operator whose result is what the in-place operator of ``node`` writes into its first argument.

    Return None where there is none.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if written.count(True) != 1 or not written[0] or torch.Tag.inplace_view in node.target.tags:
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), schema.name.split("::")[1].removesuffix("_"), None)
    found = getattr(packet, schema.overload_name or "default", None)
    if found is None or _taken(found._schema) != _taken(schema):
        return None
    return found


def _taken(schema: Any) -> list[tuple[str, str]]:
    """Return the names and types of the arguments of an operator, whether it writes into them or not."""
    return [(argument.name, str(argument.type)) for argument in schema.arguments]


def reachable(start: Node, following: Callable[[Node], Iterable[Node]], steps: int | None = None) -> Iterator[Node]:
    """Yield a node and what ``following`` leads to, each node once and the nearest first.

    There are exponentially many paths through a graph in which values meet again, but no more nodes than it has.
    ``steps`` is how far to go at most.
    """
    seen, layer, left = {start}, [start], steps
    while layer:
        yield from layer
        if left == 0:
            return
        left = None if left is None else left - 1
        found = dict.fromkeys(n for here in layer for n in following(here) if n not in seen)
        seen.update(found)
        layer = list(found)


def remembered(node: Node, compute: Callable[[Node], _T]) -> _T:
    """Return ``compute(node)``, computed again only where the arguments of the node or of its operands have changed.

    Kept with the graph, so that it goes when the graph does.
    """
    known = node.graph.__dict__.setdefault("_spinpass_remembered", {})
    witness = (node.args, node.kwargs, *(operand.args for operand in node.all_input_nodes))
    found = known.get((compute, node))
    if found is None or len(found[0]) != len(witness) or not all(a is b for a, b in zip(found[0], witness)):
        found = known[compute, node] = (witness, compute(node))
    result: _T = found[1]
    return result


def value(node: Node) -> Any:
    """Return the fake value that export recorded for the node, or None where it recorded none."""
    return node.meta.get("val")


def known_integers(node: Node) -> Tensor | None:
    """Return the value of a small lifted index tensor, int64, also behind copies of it.

    Return None where the value is known at run time only.
    """
    while op_name(node) in _COPIES:
        node = node.all_input_nodes[0]
    known = node.meta.get(KNOWN)
    return known if isinstance(known, Tensor) else None


def elements(node: Node) -> int:
    """Return how many elements a tensor has, dynamic axes counted as one."""
    total = 1
    for size in shape(node):
        total *= size if isinstance(size, int) else 1
    return total


def shape(node: Node) -> tuple[Size, ...]:
    """Return the sizes of a tensor, dynamic ones as symbolic expressions; () for what is no tensor."""
    val = value(node)
    if not isinstance(val, Tensor):
        return ()
    known = _SHAPES.get(node)
    if known is None:
        known = _SHAPES[node] = tuple(_size(s) for s in val.shape)
    return known


_SHAPES: WeakKeyDictionary[Node, tuple[Size, ...]] = WeakKeyDictionary()  # reading symbolic sizes is slow


def _size(size: Any) -> Size:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def is_float(node: Node) -> bool:
    """Return whether the value is a dense floating-point tensor of 16 bits or more: an axis of such a one has a basis.

    Numbers of fewer bits are codes, which a rotation would round once more.
    """
    val = value(node)
    if not isinstance(val, Tensor):
        return False
    kind: torch.dtype = val.dtype
    return kind.is_floating_point and kind.itemsize >= 2 and val.layout is torch.strided


def is_check(node: Node) -> bool:
    """Return whether the node is an assertion, which has no users and must stay."""
    return "assert" in op_name(node) or "sym_constrain" in op_name(node)


def is_random(node: Node) -> bool:
    """Return whether the operator gives other values each time, from a generator of random numbers.

    Dropout that is not active gives none.
    """
    if not is_op(node) or torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    bound = arguments(node)
    rate = bound.get("dropout_p", bound.get("p") if "train" in bound else 1.0)
    return rate != 0 and bound.get("train", True) is not False


def reads_bits(node: Node) -> bool:
    """Return whether the node reads the bits of its operand as those of another type."""
    return op_name(node) == "aten::view" and "dtype" in arguments(node)


def lifted(node: Node) -> tuple[Any, Any]:
    """Return the node's arguments, with every floating dtype raised to float64 and complex ones to complex128.

    A cast to fewer than 16 bits stays: it is a rounding to codes that the program means.
    """

    def lift(arg: Any) -> Any:
        if isinstance(arg, torch.dtype):
            if arg.is_floating_point and arg.itemsize >= 2:
                return torch.float64
            return torch.complex128 if arg.is_complex else arg
        if isinstance(arg, (list, tuple)):
            return type(arg)(lift(a) for a in arg)
        return arg

    return lift(node.args), {k: lift(v) for k, v in node.kwargs.items()}


_CONTEXTS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
_COPIES = {"aten::lift_fresh_copy", "aten::lift_fresh", "aten::detach", "aten::detach_", "aten::clone", "aten::alias"}


def same_strides(a: Node, b: Node) -> bool:
    """Return whether two values of one rank are known to have the same strides."""
    pairs = zip(value(a).stride(), value(b).stride(), strict=True)
    return all(statically_known_true(x == y) for x, y in pairs)

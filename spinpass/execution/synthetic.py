"""Inputs for a program, made from its own placeholder specs.

Sizes are those of the program's example inputs where these are small. Else the independent symbols of the input shapes
get small numbers within the range constraints, and sizes that are expressions of others (a mask over past + new tokens)
follow. Integers are chosen by what the graph does with them (see :class:`.roles.InputRole`); floats are drawn from a
standard normal distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.graph import HOST, shape, value

from .interpreter import flat_inputs
from .returned import returned_state
from .roles import InputRole, role_of

Sizes = dict[Any, int]
"""The value of each sympy symbol."""

_BATCH = 2
_LENGTHS = (5, 3, 7, 4, 6)
_OTHER_LENGTHS = (8, 6, 9, 5, 7)
_LARGE = 64  # example inputs with a longer dynamic axis are not used: the check should be cheap


@dataclass(frozen=True)
class UserInput:
    """One tensor or number that the caller gives.

    Attributes:
        node: its placeholder.
        shape: ints and symbolic expressions; () for a number.
        dtype: None for a number.
        role: what it is for, if it is an integer tensor.
        bound: the size of the smallest axis that it indexes, None where that is unknown.
    """

    node: Node
    shape: tuple[Any, ...]
    dtype: torch.dtype | None
    role: InputRole
    bound: int | None

    @property
    def name(self) -> str:
        """Return the name of the placeholder."""
        return self.node.name

    @property
    def device(self) -> torch.device:
        """Return where the program takes the tensor; a number is on the CPU."""
        val = value(self.node)
        return val.device if isinstance(val, Tensor) else HOST


def synthetic_inputs(ep: ExportedProgram, *, seed: int = 0, sizes: Sizes | None = None) -> dict[str, Any]:
    """Return {user placeholder name: value}, valid for ``ep`` and the same for the same seed.

    Tensors have the dtype and device of the placeholder. With ``sizes`` of one's own no example inputs are used.

    Raises:
        ConfigError: no small sizes satisfy the constraints, or a size cannot be derived from the others.
    """
    inputs = user_inputs(ep)
    generator = torch.Generator("cpu").manual_seed(seed)
    examples = _examples(ep, inputs) if sizes is None else {}
    if sizes is None:
        sizes = bound_sizes(inputs, examples) if examples else _chosen_sizes(ep, inputs)
    fixed = specialised(ep)
    return {i.name: fixed[i.name] if i.name in fixed else _value(i, sizes, examples, generator) for i in inputs}


def user_inputs(ep: ExportedProgram) -> list[UserInput]:
    """Return the user inputs in the order of the signature, with their roles."""
    nodes = {node.name: node for node in ep.graph.nodes if node.op == "placeholder"}
    specs = ep.graph_signature.input_specs
    return [_user_input(nodes[spec.arg.name]) for spec in specs if spec.kind is InputKind.USER_INPUT]


def _user_input(node: Node) -> UserInput:
    val = value(node)
    if not isinstance(val, Tensor):
        return UserInput(node, (), None, InputRole.OTHER, None)
    role, bound = (InputRole.OTHER, None) if val.is_floating_point() else role_of(node)
    return UserInput(node, shape(node), val.dtype, role, bound)


def specialised(ep: ExportedProgram) -> dict[str, Any]:
    """Return the plain values that export has made of inputs, by placeholder name."""
    args = [spec.arg for spec in ep.graph_signature.input_specs]
    return {arg.name: arg.value for arg in args if isinstance(arg, ConstantArgument)}


# -- sizes -----------------------------------------------------------------------------------------------------------


def bound_sizes(inputs: list[UserInput], values: Mapping[str, Any]) -> Sizes:
    """Return the symbols that stand alone as a size of some input, with their value in ``values``."""
    sizes: Sizes = {}
    for spec in inputs:
        if spec.dtype is None and isinstance(value(spec.node), torch.SymInt):
            sizes.setdefault(value(spec.node).node.expr, values[spec.name])
        for expression, size in zip(spec.shape, getattr(values[spec.name], "shape", ()), strict=False):
            if getattr(expression, "is_symbol", False):
                sizes.setdefault(expression, size)
    return sizes


def concrete(size: Any, sizes: Sizes) -> int:
    """Return a size or symbolic expression as a number.

    Raises:
        ConfigError: a symbol of it has no value in ``sizes``.
    """
    if isinstance(size, int):
        return size
    result = size.subs(sizes)
    if not result.is_number:
        raise ConfigError(f"size {size} cannot be derived from the other input sizes; give the inputs explicitly")
    return int(result)


def out_of_range(ep: ExportedProgram, sizes: Sizes) -> str | None:
    """Say which range constraint ``sizes`` break first, or return None where they break none."""
    for symbol, allowed in ep.range_constraints.items():
        result = symbol.subs(sizes)
        if result.is_number and not allowed.lower <= result <= allowed.upper:
            return f"{symbol} = {result} is outside {allowed.lower}..{allowed.upper}"
    return None


def other_sizes(ep: ExportedProgram, equal: Collection[Collection[Any]] = ()) -> Sizes | None:
    """Choose sizes other than those of :func:`synthetic_inputs`, the same for the symbols of each group of ``equal``.

    Return None where there are no others to choose.

    Raises:
        ConfigError: no small sizes satisfy the constraints.
    """
    inputs = user_inputs(ep)
    if _has_features(ep, inputs) or not any(True for _ in _symbols(inputs)):
        return None
    return _chosen_sizes(ep, inputs, batch=_BATCH + 1, lengths=_OTHER_LENGTHS, equal=equal)


def _chosen_sizes(
    ep: ExportedProgram,
    inputs: list[UserInput],
    *,
    batch: int = _BATCH,
    lengths: tuple[int, ...] = _LENGTHS,
    equal: Collection[Collection[Any]] = (),
) -> Sizes:
    """Choose small sizes within the range constraints, one for each group of ``equal``.

    Raises:
        ConfigError: they break another constraint.
    """
    following = iter(lengths * 16)
    sizes: Sizes = {}
    for symbol, axis in _symbols(inputs):
        if symbol in sizes:
            continue
        like = next((other for group in equal if symbol in group for other in group if other in sizes), None)
        wanted = sizes[like] if like is not None else batch if axis == 0 else next(following)
        allowed = ep.range_constraints.get(symbol)
        sizes[symbol] = wanted if allowed is None else int(min(max(wanted, allowed.lower), allowed.upper))
    broken = out_of_range(ep, sizes)
    if broken is not None:
        raise ConfigError(f"no small input sizes found: {broken}; give the inputs explicitly")
    return sizes


def _symbols(inputs: list[UserInput]) -> Iterator[tuple[Any, int]]:
    """Yield (symbol, axis) for every symbol in a size of an input, as often as it occurs."""
    for spec in inputs:
        val = value(spec.node)
        if isinstance(val, torch.SymInt):
            yield val.node.expr, 1
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                yield from ((symbol, axis) for symbol in sorted(size.free_symbols, key=str))


# -- values ----------------------------------------------------------------------------------------------------------


def _examples(ep: ExportedProgram, inputs: list[UserInput]) -> dict[str, Any]:
    """Return the program's example inputs by name.

    Return nothing where it has none, where they are fake, or where a dynamic axis is long.
    """
    if ep.example_inputs is None:
        return {}
    try:
        values = flat_inputs(ep, ep.example_inputs)
    except ConfigError:  # a container class that this process has not registered: make values from the specs
        return {}
    tensors = [(spec, values[spec.name]) for spec in inputs if spec.dtype is not None]
    if any(type(v) not in (Tensor, torch.nn.Parameter) for _, v in tensors):
        return {}
    dynamic = [size for spec, v in tensors for known, size in zip(spec.shape, v.shape) if not isinstance(known, int)]
    return {} if any(size > _LARGE for size in dynamic) and not _has_features(ep, inputs) else values


def _has_features(ep: ExportedProgram, inputs: list[UserInput]) -> bool:
    """Return whether the program takes images, sounds or embeddings beside ids.

    How many of them belong to which ids only its examples tell.
    """
    state = set(returned_state(ep).values())
    has_ids = any(spec.role is InputRole.LOOKUP for spec in inputs)
    floats = [spec for spec in inputs if spec.dtype is not None and spec.dtype.is_floating_point]
    return has_ids and any(spec.name not in state for spec in floats)


def _value(spec: UserInput, sizes: Sizes, examples: Mapping[str, Any], generator: torch.Generator) -> Any:
    val = value(spec.node)
    example = examples.get(spec.name)
    if isinstance(val, torch.SymInt):
        return concrete(val.node.expr, sizes)
    if not isinstance(val, Tensor):
        return example if example is not None else val
    if isinstance(example, Tensor) and not _is_blank(example):
        return example.detach().clone()
    return fresh(spec, tuple(concrete(size, sizes) for size in spec.shape), generator).to(spec.device)


def _is_blank(example: Tensor) -> bool:
    """Return whether an example repeats one float, as an empty cache does, which would hide a wrong rotation."""
    return example.is_floating_point() and bool((example == example.flatten()[:1]).all())


def fresh(spec: UserInput, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return new values of shape ``size`` according to the role, in the input's dtype and on the CPU."""
    dtype = spec.dtype or torch.int64
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    if spec.role is InputRole.LOOKUP:
        return torch.randint(0, spec.bound or 1, size, generator=generator, dtype=dtype, device="cpu")
    if spec.role is InputRole.POSITION:
        return torch.arange(size[-1] if size else 1, dtype=dtype, device="cpu").expand(size).clone()
    return torch.ones(size, dtype=dtype, device="cpu")


# -- the next step of a closed loop ----------------------------------------------------------------------------------


def next_inputs(
    ep: ExportedProgram, values: Mapping[str, Any], state: Mapping[str, Tensor], *, seed: int
) -> dict[str, Any] | str:
    """Return the inputs of the step after one that was run with ``values`` and left ``state``, by placeholder name.

    The state is taken as it is; new ids are drawn, positions go on, and masks become all ones, so that what the program
    wrote itself is seen. Where there is no next step, for example because a size is fixed or a position would leave its
    table, a string says why.
    """
    inputs = user_inputs(ep)
    returned = {spec.name: state[spec.name] for spec in inputs if spec.name in state}
    sizes = bound_sizes(inputs, values) | bound_sizes([spec for spec in inputs if spec.name in returned], returned)
    broken = out_of_range(ep, sizes)
    if broken is not None:
        return broken
    grown = max((sum(new.shape) - sum(values[name].shape) for name, new in returned.items()), default=0)
    generator = torch.Generator("cpu").manual_seed(seed)
    following = dict(values)
    for spec in inputs:
        size = tuple(concrete(s, sizes) for s in spec.shape)
        if spec.name in returned and tuple(returned[spec.name].shape) != size:
            return f"{spec.name} was returned as {list(returned[spec.name].shape)} but is taken as {list(size)}"
        following[spec.name] = returned.get(spec.name)
        if spec.name not in returned:
            following[spec.name] = _continued(spec, values[spec.name], size, grown, generator)
    return _past_end(inputs, following) or following


def _continued(spec: UserInput, old: Any, size: tuple[int, ...], grown: int, generator: torch.Generator) -> Any:
    if not isinstance(old, Tensor):
        return old
    if spec.role is InputRole.LOOKUP:
        return fresh(spec, size, generator).to(old.device)
    if spec.role is InputRole.POSITION:
        start = old + (grown or (size[-1] if size else 1))
        return start if tuple(old.shape) == size else start.max() + fresh(spec, size, generator).to(old.device)
    if spec.role is InputRole.MASK or spec.dtype is torch.bool or tuple(old.shape) != size:
        return fresh(spec, size, generator).to(old.device)
    return old


def _past_end(inputs: list[UserInput], values: Mapping[str, Any]) -> str | None:
    """Say which input would point past the end of its table, or return None where none does."""
    for spec in inputs:
        if spec.role is InputRole.POSITION and spec.bound is not None and int(values[spec.name].max()) >= spec.bound:
            return f"{spec.name} would pass the end of a cache of {spec.bound} places"
    return None

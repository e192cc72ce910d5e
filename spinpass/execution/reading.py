"""The inputs with which a program reads a text: one sequence, at once, or piece by piece on the cache it has left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .interpreter import run
from .returned import continued_inputs
from .roles import InputRole
from .synthetic import Sizes, UserInput, bound_sizes, concrete, fresh, user_inputs

_NOTHING: Mapping[str, Tensor] = {}


def token_input(inputs: Sequence[UserInput]) -> UserInput | None:
    """Return the input of token ids: the one that is looked up in a table and holds no positions.

    Where several are, or none because ids are compared with those of images first, it is known by its name alone. None
    where there is none.
    """
    lookups = [spec for spec in inputs if spec.role is InputRole.LOOKUP and not holds_positions(spec)]
    return lookups[0] if len(lookups) == 1 else next((spec for spec in inputs if spec.name == "input_ids"), None)


def holds_positions(spec: UserInput) -> bool:
    """Say whether an input is positions: where they are rows of a table, as tokens are, its name alone tells."""
    return bool(spec.shape) and (spec.role is InputRole.POSITION or "position" in spec.name)


def reading_sizes(inputs: Sequence[UserInput], ids: UserInput, tokens: Tensor, past: int = 0) -> Sizes:
    """Return what the symbols in the shapes of the inputs are for ``tokens`` (1, length) behind ``past`` others."""
    sizes = bound_sizes([ids], {ids.name: tokens})
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if getattr(size, "is_symbol", False):
                sizes.setdefault(size, _size(spec, axis, tokens.shape[-1], past))
    return sizes


def reading_inputs(
    inputs: Sequence[UserInput],
    ids: UserInput,
    tokens: Tensor,
    sizes: Sizes,
    past: int = 0,
    state: Mapping[str, Tensor] = _NOTHING,
) -> dict[str, Any]:
    """Return the inputs by name: every token seen, positions from ``past`` on, and ``state`` where it holds one.

    Other float inputs are zeros, which is what an empty cache is. Raises ConfigError where a size is not in ``sizes``.
    """
    given = {**state, ids.name: tokens.to(ids.device)}
    return {spec.name: given[spec.name] if spec.name in given else _value(spec, sizes, past) for spec in inputs}


def read_in_pieces(ep: ExportedProgram, ids: UserInput, pieces: Iterable[Tensor], seen: Tensor | None = None) -> Tensor:
    """Read a text piece by piece, each on the state that those before have left.

    Args:
        ep: the program; its first output is the logits.
        ids: its input of token ids.
        pieces: of the text, integers (1, length), on any device.
        seen: which tokens of it are no padding, integers (length,) of 0 and 1: masks close the others, and positions
            are counted without them. None sees all.

    Returns:
        The logits of all tokens in the program's dtype, (1, length, vocabulary).

    Raises:
        ConfigError, ProgramError: the program does not take so many tokens behind so many others.
    """
    specs, state = user_inputs(ep), continued_inputs(ep)
    logits: list[Tensor] = []
    held: dict[str, Tensor] = {}
    past = 0
    for piece in pieces:
        sizes = reading_sizes(specs, ids, piece, past)
        given = reading_inputs(specs, ids, piece, sizes, past, held)
        if seen is not None:
            upto = seen[: past + piece.shape[1]].to(ids.device)
            given |= {s.name: _without_padding(s, given[s.name], upto) for s in specs if s.name not in held}
        outputs = run(ep, given)
        logits.append(outputs[0])
        held = {given: outputs[index] for given, index in state.items()}
        past += piece.shape[1]
    return torch.cat(logits, 1)


def _without_padding(spec: UserInput, given: Any, seen: Tensor) -> Any:
    """Return a mask or the positions for the tokens up to here, the last ones of which are given."""
    if spec.role is InputRole.MASK and isinstance(given, Tensor) and not given.is_floating_point():
        return seen[-given.shape[-1] :].to(given.dtype).expand_as(given)
    if not holds_positions(spec):
        return given
    return (seen.cumsum(0) - 1).clamp(min=0)[-given.shape[-1] :].to(given.dtype).expand_as(given)


def _value(spec: UserInput, sizes: Sizes, past: int) -> Any:
    if spec.dtype is None:
        number = spec.node.meta["val"]
        return concrete(number.node.expr, sizes) if hasattr(number, "node") else number
    size = tuple(concrete(s, sizes) for s in spec.shape)
    if spec.dtype.is_floating_point:
        return torch.zeros(size, dtype=spec.dtype, device=spec.device)
    if holds_positions(spec):
        return torch.arange(past, past + size[-1], dtype=spec.dtype, device=spec.device).expand(size)
    return fresh(spec, size, torch.Generator("cpu")).to(spec.device)


def _size(spec: UserInput, axis: int, length: int, past: int) -> int:
    """Return the size of an axis that stands alone: one sequence; its tokens, with those before in masks, and those
    before alone in caches."""
    if axis == 0 and len(spec.shape) > 1:
        return 1
    if spec.dtype is not None and spec.dtype.is_floating_point:
        return past
    return past + length if spec.role is InputRole.MASK else length

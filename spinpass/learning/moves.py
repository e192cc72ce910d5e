"""Parts: constants of a program as functions of moves, of which zeros leave them as they are.

    constant = f(start, moves)

What a move means is the part's affair alone. The loop knows that it begins at zero, of which kind it is, and how fast
that kind is learned; so a kind can be dropped by setting its moves to zero again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram


class LearningPart(Protocol):
    """Some constants that are learned together, such as one weight.

    Attributes:
        moves: by kind the tensor that is learned, a leaf that requires gradients and begins at zero.
        places: the placeholders whose values the part computes.
        depends: other parts, by whose moves its value is computed, too.
    """

    @property
    def moves(self) -> Mapping[str, Tensor]:
        """By kind, what is learned."""

    @property
    def places(self) -> tuple[str, ...]:
        """The placeholders that the part has values for."""

    @property
    def depends(self) -> tuple[LearningPart, ...]:
        """The parts of whose moves the value is made as well."""

    def value(self) -> Tensor:
        """Return the constant, with gradients where they are recorded."""


def values(parts: Sequence[LearningPart]) -> dict[str, Tensor]:
    """The constants of all parts by placeholder name."""
    return {place: made for part in parts for made in (part.value(),) for place in part.places}


def places_of(program: ExportedProgram) -> dict[str, str]:
    """The placeholders that stand for a program's constants, by the names of these."""
    specs = program.graph_signature.input_specs
    return {spec.target: spec.arg.name for spec in specs if spec.target is not None}


def kinds_of(parts: Sequence[LearningPart]) -> tuple[str, ...]:
    """The kinds of moves that parts have, each once, in their order."""
    return tuple(dict.fromkeys(kind for part in parts for kind in part.moves))


def of_kind(parts: Sequence[LearningPart], kind: str) -> list[Tensor]:
    """The moves of a kind."""
    return [part.moves[kind] for part in parts if kind in part.moves]


def all_moves(parts: Sequence[LearningPart]) -> list[Tensor]:
    """The moves of all parts, kind by kind."""
    return [move for kind in kinds_of(parts) for move in of_kind(parts, kind)]


def set_moves(moves: Sequence[Tensor], to: Sequence[Tensor] | None) -> None:
    """Give moves other values; None: zeros."""
    with torch.no_grad():
        for at, move in enumerate(moves):
            move.zero_() if to is None else move.copy_(to[at])


@contextmanager
def without(parts: Sequence[LearningPart], kind: str) -> Iterator[None]:
    """Leave the moves of a kind out for a while."""
    moves = of_kind(parts, kind)
    before = [move.detach().clone() for move in moves]
    set_moves(moves, None)
    try:
        yield
    finally:
        set_moves(moves, before)

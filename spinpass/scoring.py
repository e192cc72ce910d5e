"""Logits of an exported program for token ids, whatever else it takes: masks, positions, an empty cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .errors import ConfigError
from .execution import run
from .input_roles import Role
from .synthetic import UserInput, bound_sizes, concrete, fresh, user_inputs


class ProgramScorer:
    """A program that takes token ids and returns logits first, in its own dtype.

    Raises ConfigError: no input of it, or more than one, is looked up in a table of tokens.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._inputs = user_inputs(program)
        lookups = [spec for spec in self._inputs if spec.role is Role.LOOKUP]
        if len(lookups) != 1:
            names = ", ".join(spec.name for spec in lookups) or "none"
            raise ConfigError(f"which input takes the token ids is not clear: looked up in tables are {names}")
        self._ids = lookups[0]

    def inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        """The program's inputs by name: one sequence, every token of it seen, positions from 0, no cache."""
        tokens = torch.tensor([list(ids)], dtype=self._ids.dtype)
        sizes = bound_sizes([self._ids], {self._ids.name: tokens})
        for spec in self._inputs:
            for axis, size in enumerate(spec.shape):
                if getattr(size, "is_symbol", False):
                    sizes.setdefault(size, _size(spec, axis, len(ids)))
        for symbol, allowed in self.program.range_constraints.items():  # a lower bound of 2 is an artefact of export
            size = symbol.subs(sizes)
            if size.is_number and size > allowed.upper:
                raise ConfigError(f"the program does not take {len(ids)} tokens: {symbol} is at most {allowed.upper}")
        return {spec.name: tokens if spec is self._ids else self._value(spec, sizes) for spec in self._inputs}

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(length, vocabulary), float32. ConfigError where the program does not take that many tokens."""
        logits: Tensor = run(self.program, self.inputs(ids))[0]
        return logits[0].float()

    def _value(self, spec: UserInput, sizes: dict[Any, int]) -> Any:
        if spec.dtype is None:
            return concrete(spec.node.meta["val"].node.expr, sizes)
        size = tuple(concrete(s, sizes) for s in spec.shape)
        return (
            torch.zeros(size, dtype=spec.dtype)
            if spec.dtype.is_floating_point
            else fresh(spec, size, torch.Generator())
        )


def _size(spec: UserInput, axis: int, length: int) -> int:
    """Of an axis whose size stands alone: one sequence, its length in masks and positions, nothing in caches."""
    if axis == 0 and len(spec.shape) > 1:
        return 1
    return 0 if spec.dtype is not None and spec.dtype.is_floating_point else length

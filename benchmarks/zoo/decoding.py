"""A greedy closed loop over one decoding program: from an empty cache, each step on the cache that came back.

An empty or zero cache means the same in every basis, so nothing here knows that a cache may be rotated: the original
and the rotated program are driven alike, and only ids and logits are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError, ProgramError
from spinpass.execution import InputRole, UserInput, execute, flat_inputs, output_names, user_input_names, user_inputs

PROMPT, STEPS = 4, 26  # from below every window of the tiny configurations to beyond it
_IDS = "input_ids"
_CACHES = re.compile(r"past_key_values|cache(?!_position)|state|mems")


def greedy(
    program: ExportedProgram, *, float64: bool, steps: int = STEPS, like: ExportedProgram | None = None
) -> list[Tensor]:
    """The logits of the last token after the prompt and after each of ``steps`` greedy tokens. ``like``: the program
    that the prompt is made for, if another: what a transformed one looks up may be read off it less exactly.

    A program that takes no other number of tokens than its example gets that number: the greedy token, repeated.
    Raises ConfigError where the program's inputs are not understood, ProgramError where it cannot be run so.
    """
    driver = _Driver(program)
    driver.bound = driver.bound if like is None else _Driver(like).bound
    try:
        return _loop(driver, program, float64, PROMPT, 1, steps)
    except ProgramError:
        return _loop(driver, program, float64, driver.new, driver.new, steps)


def _loop(
    driver: _Driver, program: ExportedProgram, float64: bool, prompt: int, tokens: int, steps: int
) -> list[Tensor]:
    """A prompt of ``prompt`` tokens, then ``steps`` times ``tokens`` tokens."""
    ids = driver.first_ids(prompt)
    values = driver.values(ids, past=0, caches={})
    results: list[Tensor] = []
    done = 0
    for _ in range(steps + 1):
        run = execute(program, values, float64=float64)
        logits = run.outputs[0]
        results.append(logits[:, -1])
        done += ids.shape[1]
        ids = results[-1].argmax(-1, keepdim=True).reshape(ids.shape[0], 1).repeat(1, tokens)
        values = driver.values(ids, past=done, caches=driver.returned(run.outputs) | run.state)
    return results


def takes_cache(program: ExportedProgram) -> bool:
    """The program has inputs that hold what earlier steps left."""
    return any(_CACHES.match(name) for name in user_input_names(program))


def compare(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, Any]:
    """Two results of :func:`greedy`: equal tokens, and the largest error of a logit relative to the largest."""
    scale = max(float(x.abs().max()) for x in ours)
    error = max(float((x.double() - y.double()).abs().max()) for x, y in zip(ours, theirs, strict=True))
    return {
        "steps": len(ours) - 1,
        "tokens_equal": all(torch.equal(x.argmax(-1), y.argmax(-1)) for x, y in zip(ours, theirs, strict=True)),
        "error": error / scale if scale else error,
    }


class _Driver:
    """Makes the inputs of every step from the shapes of the example inputs: an axis as long as the example's tokens
    grows with the tokens, one as long as its cache with the cache, one as long as both with both."""

    def __init__(self, program: ExportedProgram) -> None:
        self.specs = user_inputs(program)
        self.examples = flat_inputs(program, program.example_inputs)
        if _IDS not in self.examples:
            raise ConfigError(f"the program takes {', '.join(user_input_names(program))}, and no {_IDS}")
        self.batch, self.new = (int(size) for size in self.examples[_IDS].shape)
        self.old = self._past()
        self.bound = next(s.bound for s in self.specs if s.name == _IDS) or 3
        self._outputs = [name.replace(".", "_") for name in output_names(program)]

    def first_ids(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(0, self.bound, (self.batch, count), generator=generator)

    def values(self, ids: Tensor, past: int, caches: Mapping[str, Any]) -> dict[str, Any]:
        """Values by placeholder name for a step with ``ids`` on ``past`` tokens; caches that are not given are zero."""
        return {s.name: ids if s.name == _IDS else self._value(s, ids.shape[1], past, caches) for s in self.specs}

    def returned(self, outputs: tuple[Any, ...]) -> dict[str, Any]:
        """The outputs that are inputs of the next step, by placeholder name."""
        return {n: v for n, v in zip(self._outputs, outputs, strict=True) if n in self.examples and n != _IDS}

    def _value(self, spec: UserInput, new: int, past: int, caches: Mapping[str, Any]) -> Any:
        example = self.examples[spec.name]
        if spec.name in caches:
            return caches[spec.name]
        if not isinstance(example, Tensor):
            return example
        size = [self._size(known, old, new, past) for known, old in zip(spec.shape, example.shape, strict=True)]
        if _CACHES.match(spec.name):
            return torch.zeros(size, dtype=example.dtype)
        if spec.role is InputRole.POSITION or "position" in spec.name:
            if size[-1:] != [new]:
                raise ProgramError(f"{spec.name} takes {size[-1]} positions, there are {new} tokens")
            return torch.arange(past, past + new, dtype=example.dtype).expand(size)
        if spec.role is InputRole.MASK or "mask" in spec.name:
            return torch.ones(size, dtype=example.dtype)
        if list(example.shape) == size:
            return example
        raise ConfigError(f"input {spec.name} {list(example.shape)} is neither ids, positions, mask nor cache")

    def _size(self, known: Any, old: int, new: int, past: int) -> int:
        if isinstance(known, int):
            return known
        sizes = {self.batch: self.batch, self.new: new, self.old: past, self.old + self.new: past + new}
        if old not in sizes:
            raise ConfigError(f"an axis of {old} is none of {', '.join(map(str, sizes))}")
        return sizes[old]

    def _past(self) -> int:
        """How many tokens the example's cache holds: the size of its growing axis."""
        sizes = {
            int(size)
            for spec in self.specs
            if _CACHES.match(spec.name)
            for known, size in zip(spec.shape, self.examples[spec.name].shape, strict=False)
            if not isinstance(known, int) and size != self.batch
        }
        if len(sizes) > 1:
            raise ConfigError(f"caches of different lengths: {sorted(sizes)}")
        return sizes.pop() if sizes else -1

"""Errors measured against the size of what stands around them, so that a large column or row hides nothing.

An error at (row, column) is relative to the smaller of the usual values in its row and in its column: the medians, of
all and of those that are not the same in both, so that neither some massive values nor a number that fills places hides
the rest. Where the first is 0, most places are not written, and the second counts alone.
Where a value is tiny because large ones have cancelled, rounding alone exceeds that; how much of it there is, is
measured: the original runs again with every value shaken by its last bits. The floor that follows never exceeds what is
allowed relative to the largest value of the whole output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.execution import Watch
from spinpass.graph import mutates

from .certificate import Difference, is_fill, wide

Noise = Callable[[], Tensor | None]
"""What measures how far rounding alone moves each value of an output."""

Returned = tuple[tuple[Any, ...], Mapping[str, Any]]
"""What a run returns: its outputs, and by name the state that it leaves."""

_MARGIN = 64.0  # a rotation and its inverse round some tens of times more often than the original
_LARGE = 1e8  # masks reach beyond; the activations of a vector do not


def vector_error(reference: Any, result: Any, bound: float, noise: Noise) -> float:
    """Return the largest error relative to the size of its own row and column, in float64.

    Args:
        reference: what the original returns.
        result: what is compared with it; values of another shape, or no tensors, are not judged here.
        bound: the error allowed. ``noise`` is asked only where it is exceeded.
        noise: the absolute rounding error of each value of the reference.
    """
    if not isinstance(reference, Tensor) or not isinstance(result, Tensor) or reference.shape != result.shape:
        return 0.0
    a, b = wide(reference), wide(result)
    equal = (a == b) | (a.isnan() & b.isnan())
    if bool(equal.all()):
        return 0.0
    error = torch.where(equal, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = torch.where(a.isfinite(), a.abs(), math.nan)
    scale = _around(size, _usual)
    unequal = _around(torch.where(equal, math.nan, size), _usual)
    # most places of a cache that is not full hold zeros: their median says nothing of those that are written
    scale = torch.where(unequal > 0, torch.where(scale > 0, torch.minimum(scale, unequal), unequal), scale)
    found = _worst(error, scale)
    if found <= bound or not bound > 0:
        return found
    moved = noise()
    if moved is None or moved.shape != scale.shape:
        return found
    largest = float(torch.where(equal & is_fill(a), 0.0, size).nan_to_num(nan=0.0).max())
    most = _MARGIN * _around(moved.nan_to_num(nan=0.0, posinf=0.0), _largest_of)
    floor = most / bound
    return _worst(error, torch.maximum(scale, floor if largest <= float(most.max()) else floor.clamp(max=largest)))


def judged(difference: Difference, bound: float, noise: Noise) -> Difference:
    """Return the difference of an output that may be nothing but rounding, as sums are that cancel: then it is measured
    against what rounding is allowed, and not against itself."""
    if difference.relative <= bound or not bound > 0 or not math.isfinite(difference.error):
        return difference
    moved = noise()
    most = 0.0 if moved is None or not moved.numel() else _MARGIN * float(moved.nan_to_num(nan=0.0, posinf=0.0).max())
    return replace(difference, scale=most / bound) if difference.scale <= most else difference


def _around(size: Tensor, of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return for each value the smaller of what ``of`` makes of its row and of its column."""
    if size.ndim == 0:
        return size.nan_to_num(nan=0.0)
    row = of(size, -1).unsqueeze(-1)
    if size.ndim == 1 or math.prod(size.shape[:-1]) == 1:
        return row.expand_as(size)
    return torch.minimum(row, of(size.flatten(0, -2), 0))


def _usual(size: Tensor, dim: int) -> Tensor:
    """Return the median of the values that are numbers, 0 where none is."""
    return size.nanmedian(dim).values.nan_to_num(nan=0.0)


def _largest_of(size: Tensor, dim: int) -> Tensor:
    return size.amax(dim)


def _worst(error: Tensor, scale: Tensor) -> float:
    return float(torch.where(error > 0, error / scale, 0.0).max())


class Shaken:
    """A watch that moves every value of a run by rounding: some bits of itself or of the vector it lies in.

    In a rotated basis each coordinate carries the rounding of the largest. Zeros stay, and so do the values of masks.
    Inputs are shaken where they lie, so a run is given copies.

    Args:
        seed: of the signs.
        unit: the size of one rounding.
    """

    def __init__(self, seed: int, unit: float) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._unit = unit

    def __call__(self, node: Node, result: Any) -> Any:
        """Return the value, shaken where an operator has computed it in floating point."""
        computed = node.op == "call_function" or (
            node.op == "placeholder" and not node.name.startswith(("p_", "b_", "c_"))
        )
        if not computed or not isinstance(result, Tensor) or not self._rounds(result) or not result.numel():
            return result
        size = result.abs()
        usual = torch.where(size < _LARGE, size, 0.0)
        around = usual.amax(-1, keepdim=True) if result.ndim else usual
        amount = torch.where(size < _LARGE, torch.maximum(size, around), 0.0)
        signs = torch.randint(0, 2, result.shape, generator=self._generator, dtype=result.dtype, device="cpu") * 2 - 1
        shaken = torch.where(
            (result != 0) & result.isfinite(), result + amount * self._unit * signs.to(result.device), result
        )
        # others see memory that the program writes to
        return result.copy_(shaken) if node.op == "placeholder" or mutates(node) else shaken

    def _rounds(self, result: Tensor) -> bool:
        """Say whether the value can hold one rounding."""
        return result.is_floating_point() and torch.finfo(result.dtype).eps <= self._unit


class Rounding:
    """How far rounding alone moves what a run returns: it is run again, shaken, when that is first asked.

    Args:
        runs: given the watches of two runs, what a run without one returns, and what each of the two does.
        unit: the size of one rounding.
    """

    def __init__(self, runs: Callable[[Sequence[Watch]], tuple[Returned, list[Returned]]], unit: float) -> None:
        self._run = runs
        self._unit = unit

    @cached_property
    def _runs(self) -> tuple[Returned, list[Returned]]:
        return self._run([Shaken(seed, self._unit) for seed in (1, 2)])

    def of_output(self, i: int) -> Tensor | None:
        """Return how far each value of an output moves; None where runs return different things."""
        plain, moved = self._runs
        return _largest([(plain[0][i], outputs[i]) for outputs, _ in moved])

    def of_state(self, name: str) -> Tensor | None:
        """Return how far each value of an input or buffer that the program changes moves."""
        plain, moved = self._runs
        return _largest([(plain[1].get(name), state.get(name)) for _, state in moved])


def _largest(pairs: list[tuple[Any, Any]]) -> Tensor | None:
    """Return the largest difference of the pairs, value by value; None where they are no tensors of one shape."""
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape]
    if len(tensors) < len(pairs):
        return None
    return torch.stack([(wide(a) - wide(b)).abs() for a, b in tensors]).amax(0)

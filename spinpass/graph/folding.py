"""Steps queued on a constant:  T  ->  cast( sₙ( … s₁( float64(T) ) ) ),  a piece at a time, rounded once.

A step says which axes it mixes. Along any other axis a constant can be cut, and every piece goes through the whole
queue while it is in the cache: neither a table nor a stack of experts ever stands in float64. Where all axes are mixed,
as in a matrix that is rotated on both sides, one float64 copy of it is folded in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinpass.errors import InvariantError

Step = Callable[[Tensor], Tensor]
_PIECE = 1 << 17  # elements that go through the queue at once: 1 MB in float64


@dataclass(frozen=True)
class QueuedStep:
    """This is a step, the pass that has queued it, for the one who looks for what went wrong, and the axes that it
    mixes. None: it may mix them all, and takes nothing but the whole."""

    step: Step
    by: str = ""
    axes: frozenset[int] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return what the step makes of the tensor, or of a piece of it.

        Raises:
            InvariantError: it fails, or changes the shape.
        """
        try:
            result = self.step(tensor)
        except Exception as error:  # whatever a step runs into is a bug in the pass
            raise InvariantError(f"what {self.by} has queued fails: {type(error).__name__}: {error}") from error
        if result.shape != tensor.shape:
            raise InvariantError(
                f"what {self.by} has queued changes a shape from {tuple(tensor.shape)} to {tuple(result.shape)}"
            )
        return result


def queued(step: Step, by: str, mixes: Iterable[int] | None = None) -> QueuedStep:
    """Return a step with what is known of it; one that is queued already is returned as it is."""
    if isinstance(step, QueuedStep):
        return step
    return QueuedStep(step, by, None if mixes is None else frozenset(mixes))


def folded(tensor: Tensor, steps: Sequence[QueuedStep]) -> Tensor:
    """Return a new contiguous tensor of the same dtype: the steps in float64, and one cast.

    Raises InvariantError as :class:`QueuedStep`.
    """
    axis = _free_axis(tensor, steps) if tensor.is_floating_point() else None
    with torch.no_grad():
        if axis is None:
            return folded_float64(tensor, steps).to(tensor.dtype).contiguous()
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for piece in _pieces(tensor, axis):
            made[piece] = _through(tensor[piece], steps)
    return made


def folded_float64(tensor: Tensor, steps: Sequence[QueuedStep]) -> Tensor:
    """Return what :func:`folded` casts. What is not floating point is returned as it is.

    Raises InvariantError as :class:`QueuedStep`.
    """
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    with torch.no_grad():
        wide = tensor.to(torch.float64, copy=bool(steps))  # a step may write into what it gets
        for step in steps:
            axis = _free_axis(wide, [step])
            if axis is None:
                wide = step(wide)
                continue
            for piece in _pieces(wide, axis):
                wide[piece] = step(wide[piece])
    return wide


def sliceable(shape: Sequence[int], steps: Sequence[QueuedStep]) -> bool:
    """Return whether the steps can be applied to any rows of the first axis by themselves."""
    return bool(shape) and all(step.axes is not None and 0 not in {d % len(shape) for d in step.axes} for step in steps)


def _through(piece: Tensor, steps: Sequence[QueuedStep]) -> Tensor:
    wide = piece.to(torch.float64, copy=True)
    for step in steps:
        wide = step(wide)
    return wide


def _free_axis(tensor: Tensor, steps: Sequence[QueuedStep]) -> int | None:
    """Return an axis along which a large tensor can be cut; None where the steps mix all, or where it is small."""
    mixed: set[int] = set()
    for step in steps:
        if step.axes is None:
            return None
        mixed |= {axis % tensor.ndim for axis in step.axes}
    if tensor.numel() <= _PIECE:
        return None
    return next((axis for axis, size in enumerate(tensor.shape) if axis not in mixed and size > 1), None)


def _pieces(tensor: Tensor, axis: int) -> Iterator[tuple[slice, ...]]:
    """Yield what cuts a tensor along an axis into pieces of about :data:`_PIECE` elements."""
    size = tensor.shape[axis]
    at_once = max(1, _PIECE // math.prod(n for d, n in enumerate(tensor.shape) if d != axis))
    for start in range(0, size, at_once):
        yield (*[slice(None)] * axis, slice(start, start + at_once))

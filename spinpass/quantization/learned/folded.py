"""A constant that takes up changes of basis while they learn, and may be rounded to nearest anew at every step.

    W -> W M⁻ᵀ  where it reads the space,   W -> W M  where it writes into it

Where one change lies on top of another, M is between the two: W B -> W M⁻ᵀ B. The upper one is undone once, and
multiplied by again at each step. What that rounds away is added, so that moves of zero leave every bit as it was: at 4
bits of everything a relative 3e-7 of the weights moved the divergence by a percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spinpass.graph import Layout
from spinpass.learning import LearningPart
from spinpass.rotations import Rotation

from ..rounding import rounded
from ..scheme import Weights
from .changes import LearnedChange

TakenUp = tuple[LearnedChange | Rotation, Layout, bool]
"""A change of basis, where its vectors lie in a constant, and whether the constant reads them."""


@dataclass(frozen=True, eq=False)
class FoldedConstant:
    """A constant that takes up changes of basis, and is rounded to nearest where there is a scheme for it.

    Args:
        stored: with what all of them begin with folded in, but for those that lie on top of another.
        folds: what it takes up, in order; of a change on top of another what it begins with as well.
        places: the placeholders of the constant.
        dtype: that it is stored in.
        dim: the axis that its layer contracts.
        scheme: how it is rounded; None leaves it in floats.
        rest: what ``stored`` lacks after all changes have been multiplied by, float32; None for nothing.
    """

    stored: Tensor
    folds: Sequence[TakenUp]
    places: tuple[str, ...]
    dtype: torch.dtype
    dim: int = -1
    scheme: Weights | None = None
    rest: Tensor | None = None
    moves: Mapping[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def depends(self) -> tuple[LearningPart, ...]:
        """The changes of basis that it takes up."""
        return tuple(dict.fromkeys(each for each, _, _ in self.folds if not isinstance(each, Rotation)))

    def value(self) -> Tensor:
        """Return the constant as it is stored."""
        found = taken_up(self.stored, self.folds)
        if self.rest is not None:
            found = found + self.rest
        if self.scheme is not None:
            found = _RoundedTo.apply(found, self.dim, self.scheme)  # type: ignore[no-untyped-call]
        return found.to(self.dtype)


def taken_up(stored: Tensor, folds: Sequence[TakenUp]) -> Tensor:
    """Return a constant, float32, that has taken up changes of basis."""
    found = stored.float()
    for change, layout, reads in folds:
        found = layout.apply(found, lambda x, dim, c=change, r=reads: c.apply(x, dim, dual=r))  # type: ignore[misc]
    return found


def without_upper(
    stored: Tensor, begun: Sequence[tuple[Rotation, LearnedChange | None, Layout, bool]]
) -> tuple[Tensor, list[TakenUp], Tensor | None]:
    """Return a constant without what lies on top of a change that learns, what it takes up, and its ``rest``.

    Args:
        stored: with all changes folded in, in this order.
        begun: what each of them begins with, how it learns (None: not at all), where its vectors lie, and whether the
            constant reads them.
    """
    below: list[Layout] = []
    upper: list[tuple[Rotation, Layout, bool]] = []
    folds: list[TakenUp] = []
    for start, change, layout, reads in begun:
        on_top = any(layout.overlaps(other) for other in below)
        if on_top:
            upper.append((start, layout, reads))
            folds.append((start, layout, reads))
        if change is not None:
            folds.append((change, layout, reads))
        if on_top or change is not None:
            below.append(layout)
    if not upper:
        return stored, folds, None
    found = stored.double()
    for start, layout, reads in reversed(upper):
        found = layout.apply(
            found,
            lambda x, dim, s=start, r=reads: s.apply(x, dim, inverse=True, dual=r),  # type: ignore[misc]
        )
    lower = found.float()
    with torch.no_grad():
        return lower, folds, stored.float() - taken_up(lower, folds)


class _RoundedTo(torch.autograd.Function):
    """Rounding of a matrix to nearest, with the gradient straight through."""

    @staticmethod
    def forward(ctx: object, whole: Tensor, dim: int, scheme: Weights) -> Tensor:
        del ctx
        moved = whole.movedim(dim, -1)
        codes = rounded(moved.reshape(-1, moved.shape[-1]), scheme)
        return codes.dequantized().view(moved.shape).movedim(-1, dim).contiguous()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        del ctx
        return gradient, None, None

"""A change of basis that learns, and the weights that take it up.

    x' = x F M,   M = I + E for any invertible matrix,   M = (I − S)⁻¹ (I + S), S = E − Eᵀ, for a rotation (Cayley)

factor by factor of a Kronecker product, F being where it begins. A weight W that was folded with F becomes W M⁻ᵀ where
it reads the space and W M where it writes into it, and may be rounded to nearest anew at every step, with gradients
passed straight through. Sources: SpinQuant, Liu et al., arXiv 2405.16406, section 3.2; FlatQuant, Sun et al., arXiv
2410.09426.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spinpass.graph import Layout
from spinpass.learning import LearningPart
from spinpass.rotations import Rotation, hadamard

from ..kinds import TRANSFORM
from ..rounding import rounded
from ..scheme import Weights


@dataclass(frozen=True, eq=False)
class LearnedTransform:
    """The moves of one change of basis (:class:`spinpass.learning.LearningPart`), which is no constant by itself.

    Args:
        start: where it begins, with factors.
        orthogonal: it stays a rotation.
        device: of the program.
    """

    start: Rotation
    orthogonal: bool
    device: torch.device
    places: tuple[str, ...] = ()
    moves: Mapping[str, Tensor] = field(init=False)
    depends: tuple[LearningPart, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        count = sum(len(factor) ** 2 for factor in self.start.factors)
        move = torch.zeros(count, dtype=torch.float32, device=self.device).requires_grad_()
        object.__setattr__(self, "moves", {TRANSFORM.name: move})

    def value(self) -> Tensor:
        """Return what is learned, as it is."""
        return self.moves[TRANSFORM.name]

    def turns(self) -> list[Tensor]:
        """Return M of every factor, float32 (f, f)."""
        sizes = [len(factor) for factor in self.start.factors]
        parts = torch.split(self.moves[TRANSFORM.name], [size * size for size in sizes])
        return [self._turn(part.view(size, size)) for part, size in zip(parts, sizes, strict=True)]

    def _turn(self, move: Tensor) -> Tensor:
        eye = torch.eye(len(move), dtype=move.dtype, device=move.device)
        if not self.orthogonal:
            return eye + move
        skew = move - move.t()
        found: Tensor = torch.linalg.solve(eye - skew, eye + skew)
        return found

    def apply(self, x: Tensor, dim: int, *, dual: bool) -> Tensor:
        """x M along an axis, or x M⁻ᵀ."""
        turns = [torch.linalg.inv(turn).t() if dual else turn for turn in self.turns()]
        return hadamard.multiply(x, [turn.t() for turn in turns], dim=dim)

    def factor(self, place: int, *, inverse: bool) -> Tensor:
        """F M of one factor, or its inverse, float32 (f, f)."""
        start = self.start.factors[place].to(self.device, torch.float32)
        found = start @ self.turns()[place]
        return torch.linalg.inv(found) if inverse else found

    def learned(self) -> Rotation:
        """Return what it has become, with factors in float64."""
        with torch.no_grad():
            turns = [turn.double().cpu() for turn in self.turns()]
        factors = [factor @ turn for factor, turn in zip(self.start.factors, turns, strict=True)]
        if self.orthogonal:
            factors = [_nearest_rotation(factor) for factor in factors]
        return Rotation.from_factors(factors, self.start.identity, size=self.start.size)


@dataclass(frozen=True, eq=False)
class LearnedFactor:
    """A stored factor of an online change of basis."""

    transform: LearnedTransform
    place: int
    inverse: bool
    transposed: bool
    dtype: torch.dtype
    places: tuple[str, ...]
    moves: Mapping[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def depends(self) -> tuple[LearningPart, ...]:
        """The change of basis that it is a factor of."""
        return (self.transform,)

    def value(self) -> Tensor:
        """Return the factor as it is stored."""
        found = self.transform.factor(self.place, inverse=self.inverse)
        return (found.t() if self.transposed else found).contiguous().to(self.dtype)


@dataclass(frozen=True, eq=False)
class FoldedConstant:
    """A constant that takes up changes of basis, and is rounded to nearest where there is a scheme for it.

    Args:
        stored: with what all of them begin with folded in.
        folds: the changes of basis, each with where its vectors lie, and whether the constant reads them.
        places: the placeholders of the constant.
        dim: the axis that its layer contracts.
        scheme: how it is rounded; None leaves it in floats.
    """

    stored: Tensor
    folds: Sequence[tuple[LearnedTransform, Layout, bool]]
    places: tuple[str, ...]
    dim: int = -1
    scheme: Weights | None = None
    moves: Mapping[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def depends(self) -> tuple[LearningPart, ...]:
        """The changes of basis that it takes up."""
        return tuple(dict.fromkeys(transform for transform, _, _ in self.folds))

    def value(self) -> Tensor:
        """Return the constant as it is stored."""
        found = self.stored.float()
        for transform, layout, reads in self.folds:
            found = layout.apply(found, lambda x, dim, t=transform, r=reads: t.apply(x, dim, dual=r))  # type: ignore[misc]
        if self.scheme is not None:
            found = _RoundedTo.apply(found, self.dim, self.scheme)  # type: ignore[no-untyped-call]
        return found.to(self.stored.dtype)


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


def _nearest_rotation(matrix: Tensor) -> Tensor:
    """U Vᵀ of U Σ Vᵀ, which takes away what rounding has left."""
    u, _, v = torch.linalg.svd(matrix)
    found: Tensor = u @ v
    return found

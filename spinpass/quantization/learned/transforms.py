"""A change of basis that learns, factor by factor of a Kronecker product, and the factors that a graph runs it by.

    x' = x F M,   M = I + E for any invertible matrix,   M = (I − S)⁻¹ (I + S), S = E − Eᵀ, for a rotation (Cayley)

F being where it begins. For M = I + E, with G the gradient of what became of a constant X and Y that of X:

    dE = Σ Xᵀ G over what writes into the space  −  M⁻ᵀ Σ Gᵀ Y over what reads it,  which takes Y = X M⁻ᵀ

and a skew S has the gradient of (I − S)⁻¹ (I + S) minus its transpose. Sources: SpinQuant, Liu et al., arXiv
2405.16406, section 3.2; FlatQuant, Sun et al., arXiv 2410.09426.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.graph import ProgramEditor
from spinpass.learning import LearningPart, places_of
from spinpass.passes import stored_factors
from spinpass.rotations import SCALED, Rotation, hadamard

from ..kinds import TRANSFORM
from .changes import BasisKind, LearningPlace

_DENSE = 1024  # coordinates of a space, above which a matrix without structure is not learned


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
        return [
            turned(part.view(size, size), orthogonal=self.orthogonal) for part, size in zip(parts, sizes, strict=True)
        ]

    def apply(self, x: Tensor, dim: int, *, dual: bool) -> Tensor:
        """x M along an axis, or x M⁻ᵀ."""
        turns = [torch.linalg.inv(turn).t() if dual else turn for turn in self.turns()]
        return hadamard.multiply(x, [turn.t() for turn in turns], dim=dim)

    def factor(self, place: int, *, inverse: bool) -> Tensor:
        """F M of one factor, or its inverse, float32 (f, f)."""
        start = self.start.factors[place].to(self.device, torch.float32)
        found = start @ self.turns()[place]
        return torch.linalg.inv(found) if inverse else found

    def inserted(self, editor: ProgramEditor, space: str, program: ExportedProgram) -> list[LearnedFactor]:
        """Return the factors that are stored in a graph."""
        state, places = program.state_dict, places_of(program)
        return [
            LearnedFactor(self, *how, state[name].dtype, (places[name],))
            for name, how in stored_factors(editor, self.start, space).items()
        ]

    def learned(self) -> Rotation:
        """Return what it has become, with factors in float64."""
        with torch.no_grad():
            turns = [turn.double().cpu() for turn in self.turns()]
        factors = [factor @ turn for factor, turn in zip(self.start.factors, turns, strict=True)]
        if self.orthogonal:
            factors = [nearest_rotation(factor) for factor in factors]
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


def factored(place: LearningPlace) -> Rotation | None:
    """Return a space's rotation in factors, where it has such and they are few enough to be learned."""
    rotation = place.rotation
    if rotation is None or rotation.is_offline or rotation.kind == SCALED:
        return None  # it stays what was given
    if rotation.kind == "hadamard":
        sizes = hadamard.kronecker_factors(rotation.order)
        factors = [matrix / len(matrix) ** 0.5 for matrix in hadamard.factor_matrices(rotation.order)]
        if max(sizes) <= _DENSE:
            return Rotation.from_factors(factors, place.name, size=rotation.size)
    if rotation.factors:
        return rotation
    if rotation.size > _DENSE:
        return None
    return Rotation.from_factors([rotation.matrix()], place.name)


def turned(move: Tensor, *, orthogonal: bool) -> Tensor:
    """Return M of moves E (…, n, n): I + E, or the rotation of its skew part."""
    eye = torch.eye(move.shape[-1], dtype=move.dtype, device=move.device)
    if not orthogonal:
        return eye + move
    skew = move - move.mT
    found: Tensor = torch.linalg.solve(eye - skew, eye + skew)
    return found


def nearest_rotation(matrix: Tensor) -> Tensor:
    """Return U Vᵀ of U Σ Vᵀ (…, n, n), which takes away what rounding has left."""
    u, _, v = torch.linalg.svd(matrix)
    found: Tensor = u @ v
    return found


TRANSFORMS = BasisKind(TRANSFORM, factored, LearnedTransform, f"factors of at most {_DENSE} rows")

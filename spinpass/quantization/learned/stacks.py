"""A matrix for each head that learns:  x_h' = x_h S_h M_h,  M_h = I + E_h, or a rotation by Cayley.

S_h is the matrix that all heads share at the beginning. It folds into what writes the heads and what reads them, so no
graph runs it. For M_h = I + E_h, with G_h the gradient of what became of a head X_h of a constant and Y_h that of X_h:

    dE_h = Σ X_hᵀ G_h over what writes heads  −  M_h⁻ᵀ Σ G_hᵀ Y_h over what reads them,  which takes Y_h = X_h M_h⁻ᵀ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.graph import ProgramEditor
from spinpass.learning import LearningPart
from spinpass.rotations import Rotation, multiply_blocks

from ..kinds import STACK
from .changes import BasisKind, LearningPlace
from .transforms import nearest_rotation, turned


@dataclass(frozen=True, eq=False)
class LearnedStack:
    """The moves of the matrices of all heads of a space (:class:`spinpass.learning.LearningPart`).

    Args:
        start: where it begins, blocks (heads, n, n).
        orthogonal: they stay rotations.
        device: of the program.
    """

    start: Rotation
    orthogonal: bool
    device: torch.device
    places: tuple[str, ...] = ()
    moves: Mapping[str, Tensor] = field(init=False)
    depends: tuple[LearningPart, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        move = torch.zeros(self.start.given.shape, dtype=torch.float32, device=self.device).requires_grad_()
        object.__setattr__(self, "moves", {STACK.name: move})

    def value(self) -> Tensor:
        """Return M of every head, float32 (heads, n, n)."""
        return turned(self.moves[STACK.name], orthogonal=self.orthogonal)

    def apply(self, x: Tensor, dim: int, *, dual: bool) -> Tensor:
        """x M along an axis that holds all heads side by side, or x M⁻ᵀ."""
        return multiply_blocks(x, self.value(), dim, dual=dual)

    def inserted(self, editor: ProgramEditor, space: str, program: ExportedProgram) -> list[LearningPart]:
        """Return nothing: all of it folds."""
        del editor, space, program
        return []

    def learned(self) -> Rotation:
        """Return what it has become, with blocks in float64."""
        with torch.no_grad():
            made = self.start.given @ self.value().double().cpu()
        return Rotation.from_blocks(nearest_rotation(made) if self.orthogonal else made, self.start.identity)


def for_each_head(place: LearningPlace) -> Rotation | None:
    """Return a space's matrix once for each head, or the matrices that were given; None where heads share one."""
    rotation = place.rotation
    if rotation is None or rotation.is_by_heads:
        return rotation
    if place.heads < 2 or rotation.is_offline:
        return None
    return Rotation.from_blocks(rotation.matrix().expand(place.heads, -1, -1), place.name)


STACKS = BasisKind(STACK, for_each_head, LearnedStack, "heads that take a matrix each, folded into weights")

"""A scale for each channel of act(g) · u that learns:  u' = u e^δ,  which what reads the product takes back.

It folds into the layer that writes u, its bias, and the layer behind the product, so no graph runs it; and it stays
positive. With G the gradient of what became of a constant's channels, Y = X e^±δ,

    dδ = Σ Y ∘ G over what writes u  −  Σ Y ∘ G over what reads the product
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

from ..kinds import GATE
from .changes import BasisKind, LearningPlace


@dataclass(frozen=True, eq=False)
class LearnedGate:
    """The moves of the scales of one space (:class:`spinpass.learning.LearningPart`).

    Args:
        start: where it begins, blocks of one row.
        device: of the program.
    """

    start: Rotation
    device: torch.device
    places: tuple[str, ...] = ()
    moves: Mapping[str, Tensor] = field(init=False)
    depends: tuple[LearningPart, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        move = torch.zeros(self.start.size, dtype=torch.float32, device=self.device).requires_grad_()
        object.__setattr__(self, "moves", {GATE.name: move})

    def value(self) -> Tensor:
        """Return by what each channel is multiplied beside what it begins with, float32 (n,)."""
        return self.moves[GATE.name].exp()

    def apply(self, x: Tensor, dim: int, *, dual: bool) -> Tensor:
        """x e^δ along an axis, or x e^−δ."""
        move = self.moves[GATE.name]
        return multiply_blocks(x, (-move if dual else move).exp().view(-1, 1, 1), dim)

    def inserted(self, editor: ProgramEditor, space: str, program: ExportedProgram) -> list[LearningPart]:
        """Return nothing: all of it folds."""
        del editor, space, program
        return []

    def learned(self) -> Rotation:
        """Return what it has become, in float64."""
        with torch.no_grad():
            moved = self.moves[GATE.name].double().cpu().exp()
        return Rotation.from_blocks(self.start.given.flatten() * moved, self.start.identity)


def scaled(place: LearningPlace) -> Rotation | None:
    """Return ones, or the scales that were given, where a space takes a scale for each channel."""
    if place.group != "diagonal":
        return None
    if place.rotation is None:
        return Rotation.from_blocks(torch.ones(place.size, dtype=torch.float64, device="cpu"), place.name)
    return place.rotation if place.rotation.kind == "blocks" else None


def _part(start: Rotation, orthogonal: bool, device: torch.device) -> LearnedGate:
    del orthogonal  # where scales are admitted, all positive ones are
    return LearnedGate(start, device)


GATES = BasisKind(GATE, scaled, _part, "a gate act(g)·u", roles=("gates",))

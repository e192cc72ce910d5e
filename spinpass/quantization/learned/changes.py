"""Changes of basis that learn: what every kind of them says of itself, and where it may begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.config import Role
from spinpass.graph import ProgramEditor
from spinpass.learning import LearningPart
from spinpass.rotations import Rotation

from ..kinds import Learnable


class LearningPlace(Protocol):
    """A space that a change of basis could be learned in, as plans have them.

    Attributes:
        name: of the space.
        size: how many coordinates it has.
        group: the matrices that it admits.
        heads: how many matrices it takes.
        rotation: the change of basis that is planned; None where there is none but what is given.
    """

    @property
    def name(self) -> str:
        """The name of the space."""

    @property
    def size(self) -> int:
        """How many coordinates it has."""

    @property
    def group(self) -> str:
        """The matrices that it admits."""

    @property
    def heads(self) -> int:
        """How many matrices it takes."""

    @property
    def rotation(self) -> Rotation | None:
        """The change of basis that is planned."""


class LearnedChange(LearningPart, Protocol):
    """The moves of one change of basis, which is no constant by itself: constants take it up."""

    def apply(self, x: Tensor, dim: int, *, dual: bool) -> Tensor:
        """x M along an axis, or x M⁻ᵀ, float32: what a constant that has taken up the beginning lacks."""

    def inserted(self, editor: ProgramEditor, space: str, program: ExportedProgram) -> Sequence[LearningPart]:
        """The constants of a program, which an editor has made, by which it is run there."""

    def learned(self) -> Rotation:
        """What it has become, in float64."""


@dataclass(frozen=True)
class BasisKind:
    """One kind of changes of basis.

    Attributes:
        kind: of its moves.
        begin: gives what it begins with in a place, which changes nothing of how that is rounded; None where it does
            not go.
        part: makes the moves, of the beginning, of whether only rotations are admitted, and for a device.
        needs: what a place has that it goes to, as a phrase.
        roles: rotations that a program has to be asked for beside its own, for places of this kind.
    """

    kind: Learnable
    begin: Callable[[LearningPlace], Rotation | None]
    part: Callable[[Rotation, bool, torch.device], LearnedChange]
    needs: str
    roles: tuple[Role, ...] = ()

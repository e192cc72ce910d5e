"""A vector of floats that learns:  g ∘ (1 + γ),  dγ = g ∘ G for the gradient G of the vector.

They are the scales of norms, biases, and whatever else lies along channels and is not rounded. Their number is that of
a layer's channels, so they cost nothing in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spinpass.learning import LearningPart

from ..kinds import GAIN


@dataclass(frozen=True, eq=False)
class LearnedVector:
    """The moves of one constant with one axis (:class:`spinpass.learning.LearningPart`)."""

    stored: Tensor
    places: tuple[str, ...]
    moves: Mapping[str, Tensor] = field(init=False)
    depends: tuple[LearningPart, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        move = torch.zeros(self.stored.shape, dtype=torch.float32, device=self.stored.device).requires_grad_()
        object.__setattr__(self, "moves", {GAIN.name: move})

    def value(self) -> Tensor:
        """Return the vector as it is stored."""
        return (self.stored.float() * (1 + self.moves[GAIN.name])).to(self.stored.dtype)

"""The range of a rounding that learns:  round_tokens(x; c·e^κ).

With the step Δ = c·(high − low) / (2^bits − 1) of a token, a value that is cut off becomes the end of the range, and
one within lies off by its rounding; so the range c of a token's values has the gradient

    dc = Σ G ∘ (x̂ − x where x is within, x̂ elsewhere) / c

(LSQ, Esser et al., arXiv 1902.08153; PACT, Choi et al., arXiv 1805.06085, is its second case.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinpass import operators
from spinpass.learning import LearningPart

from ..kinds import CLIP


@dataclass(frozen=True, eq=False)
class LearnedClip:
    """The moves of one rounding of tokens (:class:`spinpass.learning.LearningPart`).

    Args:
        clip: the share of a token's range that it covers, above 0 and at most 1.
        places: the placeholder that stands for it in the program that learns.
        device: of the values that are rounded.
    """

    clip: float
    places: tuple[str, ...]
    device: torch.device
    moves: Mapping[str, Tensor] = field(init=False)
    depends: tuple[LearningPart, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        move = torch.zeros((), dtype=torch.float32, device=self.device).requires_grad_()
        object.__setattr__(self, "moves", {CLIP.name: move})

    def value(self) -> Tensor:
        """Return the share, float32 (), of at most 1."""
        return (self.clip * self.moves[CLIP.name].exp()).clamp(max=1.0)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.symmetric, clip = inputs
    ctx.save_for_backward(x, output, clip)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, rounded, clip = ctx.saved_tensors
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    if ctx.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    within = (x <= clip * high) & (x >= clip * low)
    by_clip = (gradient * torch.where(within, rounded - x, rounded)).sum() / clip
    return gradient * within, None, None, by_clip.to(clip.dtype)


operators.round_tokens_within.register_autograd(_backward, setup_context=_context)

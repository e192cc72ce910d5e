"""What the hazards share: a small decoder with one twist, and beside it what is expected of the pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.support.decoders import Attention, Decoder, Shape, tokens


def param(*size: int) -> nn.Parameter:
    """Ones, which :func:`tests.support.decoders.made` replaces by random numbers."""
    return nn.Parameter(torch.ones(*size))


def merged(heads: Tensor) -> Tensor:
    """(batch, heads, seq, head) -> (batch, seq, heads · head)."""
    return heads.transpose(1, 2).flatten(2)


class Hazard(Decoder):
    """A decoder with a twist. All four rotations must be found in it, whatever the form, except as stated here."""

    reason: ClassVar[str] = ""  # what the plan says with R1 offline: the barrier that the case is about (a pattern)
    missing: ClassVar[str] = ""  # rotations that need not be found, as in "R2 R3"
    bound: ClassVar[float] = 1e-9  # of the relative error; wider only where changed constants are stored in float32
    folds: ClassVar[bool] = False  # R1 offline needs no online part once tables are untied
    shape: ClassVar[Shape] = Shape()

    def __init__(self) -> None:
        super().__init__(self.shape)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return (tokens(),)


class SecondAttention(Hazard):
    """A second attention layer, whose parts :meth:`mix` puts together."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.more()

    def more(self) -> None:
        """Further parameters."""

    def mix(self, h: Tensor) -> Tensor:
        """The normed stream -> attention's result as (batch, seq, heads · head)."""
        raise NotImplementedError

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.a2.o(self.mix(self.norm(x)))

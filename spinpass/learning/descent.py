"""Steps down the loss:  Adam on all moves, each kind at its own rate, along a warm-up and half a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spinpass.errors import LearningError
from spinpass.workers import Team

from .moves import LearningPart, all_moves, kinds_of, of_kind, set_moves

_WARM_UP = 10  # steps, or a tenth of them
_BETAS = (0.9, 0.95)


class Descent:
    """The optimizer of some parts.

    Args:
        parts: what is learned.
        rates: by kind, of Adam.
        team: the ranks whose gradients are added up.
    """

    def __init__(self, parts: Sequence[LearningPart], rates: Mapping[str, float], team: Team) -> None:
        self._rates = [rates[kind] for kind in kinds_of(parts)]
        self._moves, self._team = all_moves(parts), team
        groups = [{"params": of_kind(parts, kind), "lr": rates[kind]} for kind in kinds_of(parts)]
        self._adam = torch.optim.Adam(groups, betas=_BETAS)

    def step(self, at: int, steps: int | None, loss: float) -> None:
        """Take a step by the gradients that are there, and forget them.

        Args:
            at: which step it is, from 0.
            steps: how many there will be; None where that is not known yet, as for the first ones.
            loss: of this step.

        Raises LearningError: the loss, or a gradient, is no number.
        """
        if self._team.size > 1:
            for move in self._moves:
                move.grad = self._team.sum(torch.zeros_like(move) if move.grad is None else move.grad)
        if not (math.isfinite(loss) and all(m.grad is None or bool(m.grad.sum().isfinite()) for m in self._moves)):
            raise LearningError(
                f"the loss of step {at + 1} is {loss:.4g} and its gradient is no number: learn more slowly (rate=0.3), "
                "and see whether the program itself returns numbers for these windows"
            )
        slope = 0.5 + 0.5 * math.cos(math.pi * at / steps) if steps else 1.0
        factor = slope * min(1.0, (at + 1) / (_WARM_UP if steps is None else min(_WARM_UP, 1 + steps // 10)))
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        self._adam.step()
        self._adam.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return what :meth:`resume` goes on from."""
        return {"moves": [move.detach() for move in self._moves], "adam": self._adam.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        set_moves(self._moves, state["moves"])
        self._adam.load_state_dict(state["adam"])

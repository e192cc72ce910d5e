"""Subgraphs and regions."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.mutations.hazard import Hazard


class IfBranch(Hazard):
    """A condition."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))


class Checkpointish(Hazard):
    """A region without gradients."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y


class AutocastRegion(Hazard):
    """A region with autocast off."""

    missing = "R4"

    def between(self, x: Tensor, layer: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.blocks[0].mlp(self.norm(x))
        return x + y

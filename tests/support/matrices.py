"""Random weights, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs whose channels depend on each other: what GPTQ lives on."""
    return normal(tokens, width // 4, seed=1) @ normal(width // 4, width, seed=2) + 0.3 * normal(tokens, width, seed=3)

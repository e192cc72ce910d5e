"""The loss:  KL(p ‖ p̂) = Σ p (log p − log p̂),  the mean over tokens, in nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS = 64  # tokens that are compared at a time


class _Divergence(torch.autograd.Function):
    """The mean over rows, for log p̂ and log p (rows, vocabulary):  d/d log p̂ = −p / rows.

    It takes no memory of a vocabulary's size beside the two, and log p is overwritten with p.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=found.device)
        for q, p in zip(torch.split(found, _ROWS), torch.split(wanted, _ROWS), strict=True):
            entropy = p - q
            total += (p.exp_() * entropy).sum(dtype=torch.float64)
        ctx.save_for_backward(wanted)
        return (total / len(found)).to(found.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return p.mul(-gradient / len(p)), None


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """KL(p ‖ p̂) of log p̂ ``found`` and log p ``wanted``, each (tokens, vocabulary); ``wanted`` is overwritten.

    The gradient is that of the log-probabilities found.
    """
    result: Tensor = _Divergence.apply(found, wanted)  # type: ignore[no-untyped-call]
    return result

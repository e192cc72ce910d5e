"""The weight that makes up best for what earlier layers lost."""

from __future__ import annotations

import pytest
import torch

from spinpass.quantization.rounding.moments import Moments
from tests.support.matrices import correlated, normal


def error(moments: Moments, *matrices: torch.Tensor) -> float:
    lost, power = moments.lost(*matrices)
    return lost / power


def test_the_target_makes_up_for_what_earlier_layers_lost() -> None:
    x, matrix = correlated(400, 48), normal(9, 48)
    lost = 0.8 * x + 0.2 * x.roll(1, 1) + 0.1 * normal(400, 48, seed=7)
    moments = Moments.of([lost], [x])
    target = moments.target(matrix, 1e-6)
    assert error(moments, matrix, target) < 0.3 * error(moments, matrix, matrix)
    direct = float((x @ matrix.T - lost @ target.T).square().sum() / (x @ matrix.T).square().sum())
    assert error(moments, matrix, target) == pytest.approx(direct, rel=1e-3)
    same = Moments.of([x], [x])
    assert torch.allclose(same.target(matrix, 0.01), matrix, atol=1e-4), "nothing was lost: nothing to make up for"

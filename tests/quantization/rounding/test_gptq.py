"""GPTQ: what it makes of the columns that are still to come, and of codes and scales once all errors are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spinpass.quantization import Weights
from spinpass.quantization.rounding.gptq import refined, rounded_by_gptq
from spinpass.quantization.rounding.grid import Codes, rounded
from tests.support.matrices import correlated, normal


def off(x: Tensor, matrix: Tensor, codes: Codes) -> float:
    return float((x @ (codes.dequantized() - matrix).T).square().sum() / (x @ matrix.T).square().sum())


@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding_to_nearest(group_size: int | None, act_order: bool) -> None:
    x, matrix = correlated(512, 256), normal(24, 256)
    scheme = Weights(3, group_size, act_order=act_order)
    hessian = (x.T @ x).double()
    kept = hessian.clone()
    codes = rounded_by_gptq(matrix, hessian, scheme)
    assert torch.equal(hessian, kept) and codes.q.shape == matrix.shape
    assert off(x, matrix, codes) < 0.6 * off(x, matrix, rounded(matrix, scheme))


def test_gptq_with_independent_inputs_is_rounding_to_nearest() -> None:
    matrix = normal(6, 64)
    scheme = Weights(4)
    made = rounded_by_gptq(matrix, 7 * torch.eye(64, dtype=torch.float64), scheme)
    assert torch.equal(made.q, rounded(matrix, scheme).q)


def test_gptq_corrects_across_blocks() -> None:
    """Of two errors per pair of twins one is made up for: half the squares are left. Within a block there are none."""
    x = torch.cat([normal(400, 128), normal(400, 128)], 1)
    x[:, 128:] = x[:, :128] + 0.05 * normal(400, 128, seed=5)  # every column has a twin a block later
    matrix, scheme = normal(8, 256), Weights(3)
    assert off(x, matrix, rounded_by_gptq(matrix, (x.T @ x).double(), scheme)) < 0.65 * off(x, matrix, rounded(matrix, scheme))


def test_gptq_survives_inputs_that_are_never_used_and_a_singular_hessian() -> None:
    x = correlated(8, 32)
    x[:, 5] = 0
    codes = rounded_by_gptq(normal(4, 32), (x.T @ x).double(), Weights(4))
    assert codes.dequantized().isfinite().all()


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_sweep_lowers_the_error(group_size: int | None, symmetric: bool) -> None:
    x, matrix = correlated(512, 160), normal(24, 160)
    errors = [
        off(x, matrix, rounded_by_gptq(matrix, (x.T @ x).double(), Weights(3, group_size, symmetric, sweeps=sweeps)))
        for sweeps in (0, 1, 3)
    ]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-6)


def test_scales_are_those_of_least_error() -> None:
    """With codes fixed the error is a parabola of every scale."""
    x, matrix = correlated(300, 64), normal(5, 64)
    codes = refined(matrix, rounded(matrix, Weights(3, 32)), (x.T @ x).double(), 1)
    least = off(x, matrix, codes)
    for factor in (0.995, 1.005):
        scales = codes.scales.clone()
        scales[:, 1] *= factor
        assert off(x, matrix, replace(codes, scales=scales)) > least

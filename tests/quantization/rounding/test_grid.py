"""Rounding of weights to nearest: codes, scales, ranges and bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spinpass.quantization import Weights
from spinpass.quantization.rounding.grid import rounded
from tests.support.matrices import normal


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_is_the_nearest_point_of_its_grid(bits: int, group_size: int | None, symmetric: bool) -> None:
    matrix = normal(5, 64)
    codes = rounded(matrix, Weights(bits, group_size, symmetric, "rtn"))
    assert codes.q.dtype == torch.uint8 and int(codes.q.max()) < 2**bits
    assert codes.scales.shape == codes.zeros.shape == (5, 1 if group_size is None else 64 // group_size)
    at = codes.group_of
    points = torch.arange(2**bits)[None, None] - codes.zeros.float()[:, at, None]
    nearest = ((points * codes.scales[:, at, None] - matrix[..., None]).abs()).amin(-1)
    assert torch.allclose((codes.dequantized() - matrix).abs(), nearest, atol=1e-6)


def test_symmetric_grids_have_their_zero_in_the_middle() -> None:
    codes = rounded(normal(3, 32), Weights(4, symmetric=True))
    assert (codes.zeros == 8).all()
    assert (rounded(torch.zeros(3, 32), Weights(4)).dequantized() == 0).all()


def test_a_range_without_clipping_covers_the_largest_weight() -> None:
    matrix = normal(4, 32)
    codes = rounded(matrix, Weights(4, clip=False, symmetric=False))
    step = codes.scales.amax()
    assert (codes.dequantized() - matrix).abs().max() <= step / 2 + 1e-6


def test_clipping_lowers_the_error() -> None:
    matrix = normal(16, 64)
    matrix[:, 3] *= 6
    clipped, whole = (rounded(matrix, Weights(3, method="rtn", clip=c)).dequantized() for c in (True, False))
    assert (clipped - matrix).square().sum() < 0.8 * (whole - matrix).square().sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_group_is_rounded_by_itself(symmetric: bool) -> None:
    matrix, scheme = normal(5, 72), Weights(3, 32, symmetric=symmetric)
    codes = rounded(matrix, scheme)
    assert codes.scales.shape == (5, 3) and codes.group_of.tolist() == [0] * 32 + [1] * 32 + [2] * 8
    for k, part in enumerate(matrix.split(32, 1)):
        alone = rounded(part, replace(scheme, group_size=None))
        assert torch.equal(alone.dequantized(), codes.dequantized()[:, 32 * k : 32 * k + part.shape[1]])
    wide = rounded(matrix, replace(scheme, group_size=128))
    assert wide.scales.shape == (5, 1) and torch.equal(wide.q, rounded(matrix, replace(scheme, group_size=None)).q)


def test_bytes_are_those_of_packed_codes() -> None:
    assert rounded(normal(8, 64), Weights(4, 32)).nbytes == 8 * 64 // 2 + 8 * 2 * 4
    assert rounded(normal(8, 64), Weights(2, 32, symmetric=False)).nbytes == 8 * 64 // 4 + 8 * 2 * 4 + 8 * 2 * 2 // 8

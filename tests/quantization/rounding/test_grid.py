"""Rounding of weights: codes, ranges, and what GPTQ makes of the columns that are still to come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.quantization import Activations, Cache, QuantizationConfig, Weights
from spinpass.quantization.rounding.gptq import refined, rounded_by_gptq
from spinpass.quantization.rounding.grid import Codes, rounded
from spinpass.quantization.rounding.moments import Moments


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs whose channels depend on each other: what GPTQ lives on."""
    return normal(tokens, width // 4, seed=1) @ normal(width // 4, width, seed=2) + 0.3 * normal(tokens, width, seed=3)


def off(x: Tensor, matrix: Tensor, codes: Codes) -> float:
    return float((x @ (codes.dequantized() - matrix).T).square().sum() / (x @ matrix.T).square().sum())


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


# -- GPTQ ------------------------------------------------------------------------------------------------------------


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


def test_the_target_makes_up_for_what_earlier_layers_lost() -> None:
    x, matrix = correlated(400, 48), normal(9, 48)
    lost = 0.8 * x + 0.2 * x.roll(1, 1) + 0.1 * normal(400, 48, seed=7)
    moments = Moments.of([lost], [x])
    target = moments.target(matrix, 1e-6)
    assert moments.error(matrix, target) < 0.3 * moments.error(matrix, matrix)
    direct = float((x @ matrix.T - lost @ target.T).square().sum() / (x @ matrix.T).square().sum())
    assert moments.error(matrix, target) == pytest.approx(direct, rel=1e-3)
    same = Moments.of([x], [x])
    assert torch.allclose(same.target(matrix, 0.01), matrix, atol=1e-4), "nothing was lost: nothing to make up for"


# -- configurations --------------------------------------------------------------------------------------------------


def test_a_scheme_is_spelled_in_parts() -> None:
    config = QuantizationConfig.parse("W4G128-asym-order-a8static-kv4-head8-embed4")
    assert config.weights == Weights(4, 128, symmetric=False, act_order=True)
    assert config.activations == Activations(8, static=True) and not config.activations.is_symmetric
    assert config.cache == Cache(4)
    assert config.head == Weights(8, method="rtn") and config.embedding == Weights(4, method="rtn")
    assert QuantizationConfig.parse("kv8").weights is None
    assert Activations(8).is_symmetric and not Activations(4).is_symmetric


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("w5", "weights of 5 bits"),
        ("w4g48", "group_size 48"),
        ("a6", "activations of 6 bits"),
        ("kv2", "KV cache of 2 bits"),
        ("gptq", "add a width such as w4"),
        ("w4-nf4", "'nf4'"),
    ],
)
def test_a_bad_scheme_says_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        QuantizationConfig.parse(text)


def test_what_needs_calibration() -> None:
    assert QuantizationConfig.parse("w4").needs_calibration
    assert QuantizationConfig.parse("a8static").needs_calibration
    assert not QuantizationConfig.parse("w4-rtn-a8-kv4").needs_calibration
    assert QuantizationConfig(weights=None, overrides={"*": Weights()}).needs_calibration

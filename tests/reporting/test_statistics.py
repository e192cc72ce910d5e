"""Statistics against plain NumPy, and what they say where there is nothing to say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from spinpass.reporting.statistics import Accumulator, CentralMoments


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Far from Gaussian, far from centred: skewed, with an outlier channel."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).exp() + 5
    x[..., 1] *= 30
    return x


@pytest.mark.parametrize("channels", [7, 8])
def test_statistics_are_those_of_numpy(channels: int) -> None:
    windows = [values(2, 5, channels), values(11, channels, seed=1), values(1, 3, channels, seed=2)]
    gathered = Accumulator(channels)
    for window in windows:
        gathered.update(window)
    found = gathered.result()
    x = np.concatenate([w.double().numpy().reshape(-1, channels) for w in windows])
    ratios = np.abs(x).max(1) / np.median(np.abs(x), 1)
    d = x - x.mean()
    assert found.vectors == len(x)
    assert np.allclose(found.peaks.numpy(), np.abs(x).max(0))
    assert found.ratio == pytest.approx(ratios.max(), rel=1e-6)
    assert found.mean_ratio == pytest.approx(ratios.mean(), rel=1e-6)
    assert found.kurtosis == pytest.approx((d**4).mean() / (d**2).mean() ** 2 - 3, rel=1e-9)
    assert found.peak == pytest.approx(np.abs(x).max())


def test_moments_do_not_lose_digits_where_the_mean_is_large() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [CentralMoments.of(part + 1e6) for part in x.split(37)]
    merged = CentralMoments()
    for part in parts:
        merged = merged.merged(part)
    assert merged.excess_kurtosis == pytest.approx(CentralMoments.of(x).excess_kurtosis, abs=1e-6)


def test_known_kurtoses() -> None:
    assert CentralMoments.of(torch.tensor([-1.0, 1.0])).excess_kurtosis == -2
    gaussian = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert CentralMoments.of(gaussian).excess_kurtosis == pytest.approx(0, abs=0.02)
    assert math.isnan(CentralMoments.of(torch.ones(5)).excess_kurtosis) and math.isnan(CentralMoments().excess_kurtosis)


def test_vectors_of_zeros_have_no_ratio_and_a_median_of_zero_has_an_infinite_one() -> None:
    gathered = Accumulator(4)
    gathered.update(torch.tensor([[0.0, 0, 0, 0], [1, -2, 1, 1]]))
    assert gathered.result().ratio == 2 and gathered.result().vectors == 2
    gathered.update(torch.tensor([[0.0, 0, 0, 5]]))
    found = gathered.result()
    assert found.ratio == math.inf and found.mean_ratio == 2
    assert json.loads(json.dumps(found.to_dict()))["max_over_median"] is None


def test_nothing_seen_is_nothing_said() -> None:
    gathered = Accumulator(3)
    gathered.update(torch.zeros(0, 3))  # an expert that no token was dealt to
    found = gathered.result()
    assert found.vectors == 0 and math.isnan(found.ratio) and math.isnan(found.peak)
    assert found.to_dict()["worst_channels"] == [] and found.to_dict()["peak"] is None


def test_a_spike_of_any_window_is_kept() -> None:
    x = torch.zeros(500, 1000, dtype=torch.bfloat16)
    x[250, 777] = -9
    gathered = Accumulator(1000)
    gathered.update(x * 100)
    gathered.update(x)
    assert gathered.result().to_dict()["worst_channels"][0] == {"channel": 777, "peak": 900}

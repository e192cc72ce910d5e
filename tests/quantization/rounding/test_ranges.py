"""Ranges of activations: what is given up for the rest, and what gets a range of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spinpass.quantization import Activations
from spinpass.quantization.rounding.ranges import static_range


def test_a_static_range_gives_up_an_outlier_for_the_rest() -> None:
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    x[0, 7] = 9.0
    scheme = Activations(4, static=True, symmetric=True, sinks=False)
    found = static_range([x], scheme)
    assert float(found.scale) * 15 / 2 < 6 and math.isinf(found.limit)
    whole = static_range([x], replace(scheme, calibration="minmax"))
    assert float(whole.scale) == pytest.approx(18 / 15)
    errors = [(torch.ops.spinpass.round_tensor(x, r.scale, r.zero, 4) - x).square().sum() for r in (found, whole)]
    assert errors[0] < errors[1]
    share = static_range([x], replace(scheme, calibration="percentile", percentile=99.0))
    assert float(share.scale) * 15 / 2 == pytest.approx(float(x.abs().flatten().quantile(0.995)), rel=0.05)


def test_a_massive_token_is_scaled_into_the_range_of_the_others() -> None:
    x = torch.randn(6, 64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 200
    found = static_range(list(x), Activations(8, static=True))
    assert 3 < found.limit < 7
    rounded = torch.ops.spinpass.round_rows(x, found.scale, found.zero, found.limit, 8)
    relative = ((rounded - x).square().sum(-1) / x.square().sum(-1)).sqrt()
    assert float(relative.max()) < 0.02, "the massive tokens and the others alike"
    without = static_range(list(x), Activations(8, static=True, sinks=False))
    assert math.isinf(without.limit) and float(without.scale) > 20 * float(found.scale)
    even = static_range(list(x[:, 1:]), Activations(8, static=True))
    assert math.isinf(even.limit), "no token stands out: a maximum per token would be wasted"


@pytest.mark.parametrize("calibration", ["mse", "percentile", "minmax"])
def test_every_channel_may_have_its_own_static_range(calibration: Any) -> None:
    x = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 16)
    whole, each = (static_range(list(x), Activations(8, static=True, calibration=calibration, per_channel=p)) for p in (False, True))
    assert each.scale.shape == each.zero.shape == (16,) and whole.scale.shape == () and math.isinf(each.limit)
    relative = [
        ((torch.ops.spinpass.round_tensor(x, r.scale, r.zero, 8) - x).square().sum((0, 1)) / x.square().sum((0, 1))).amax()
        for r in (whole, each)
    ]
    assert relative[0] > 0.9, "the small channels are lost in one range"
    assert relative[1] < 1e-2

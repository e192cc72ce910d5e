"""Bits from a budget: no allocation of the same size loses less, and what loses most gets most."""

from __future__ import annotations

import itertools

import pytest
import torch

from spinpass.errors import ConfigError
from spinpass.quantization import QuantizationConfig, Weights, quantize
from spinpass.quantization.calibration.allocate import Layer, allocate, allocated
from tests.support.quantizable import inputs, program


def layers(seed: int) -> dict[str, Layer]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for k in range(4):
        scale, size = float(torch.rand((), generator=generator)) * 10, 10 * (1 + k % 2)
        found[f"layer{k}"] = Layer(size, {bits: scale * 4.0**-bits for bits in (2, 3, 4, 8)})
    return found


def total(found: dict[str, Layer], bits: dict[str, int]) -> float:
    return sum(layer.costs[bits[name]] for name, layer in found.items())


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_the_same_size_loses_less(seed: int) -> None:
    found = layers(seed)
    chosen = allocate(found, 3.5)
    spent = sum(layer.size * chosen[name] for name, layer in found.items())
    assert spent <= 3.5 * 60
    for others in itertools.product((2, 3, 4, 8), repeat=4):
        other = dict(zip(found, others))
        if sum(layer.size * other[name] for name, layer in found.items()) <= spent:
            assert total(found, chosen) <= total(found, other) + 1e-12


def test_a_width_that_is_no_better_is_jumped_over() -> None:
    found = {"a": Layer(1, {2: 1.0, 3: 0.99, 4: 0.01, 8: 0.02})}
    assert allocate(found, 2)["a"] == 2 and allocate(found, 3.9)["a"] == 2
    assert allocate(found, 4)["a"] == 4 and allocate(found, 8)["a"] == 4


def test_weights_have_the_bits_of_the_budget_on_average() -> None:
    config = QuantizationConfig.parse("w3.5-gptq-a8")
    assert config.average_bits == 3.5 and config.needs_calibration
    result = quantize(program(), config, inputs())
    codes = [w.codes for w in result.report.weights.values()]
    assert len({c.bits for c in codes}) > 1
    average = sum(c.bits * c.q.numel() for c in codes) / sum(c.q.numel() for c in codes)
    assert 3.2 < average <= 3.5
    even = quantize(program(), "w3-gptq-a8", inputs())
    assert sum(w.error for w in result.report.weights.values()) < sum(w.error for w in even.report.weights.values())


def test_overrides_stay_as_they_are() -> None:
    name = "blocks.0.mlp.up.weight"
    config = QuantizationConfig(Weights(4, method="rtn"), overrides={name: Weights(8)}, average_bits=3.0)
    made = allocated(program(), config, inputs())
    assert made.overrides[name].bits == 8 and len(made.overrides) == 14 and made.average_bits is None


def test_a_budget_that_cannot_be_met_says_so() -> None:
    with pytest.raises(ConfigError, match=r"1\.5 bits on average: choose a number from 2 to 8"):
        QuantizationConfig(average_bits=1.5)
    with pytest.raises(ConfigError, match="1 bits per weight are fewer than the least, 2"):
        allocate(layers(0), 1)
    with pytest.raises(ConfigError, match="bits on average need calibration inputs"):
        quantize(program(), "w3.5-rtn")
    with pytest.raises(ConfigError, match="name both"):
        allocated(program(), QuantizationConfig(), inputs())

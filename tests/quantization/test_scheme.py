"""Schemes: how they are spelled, what they ask for, and what is wrong with a bad one."""

from __future__ import annotations

import pytest

from spinpass.errors import ConfigError
from spinpass.quantization import Activations, Cache, QuantizationConfig, Weights


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

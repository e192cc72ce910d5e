"""Schemes: how they are spelled, what they ask for, and what is wrong with a bad one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spinpass.errors import ConfigError
from spinpass.quantization import ALIASES, PARTS, Activations, Cache, QuantizationConfig, Weights


def test_a_scheme_is_spelled_in_parts() -> None:
    grouped = QuantizationConfig.parse("w4-head8g64-embed4g32")
    assert grouped.head == Weights(8, group_size=64, method="rtn")
    assert grouped.embedding == Weights(4, group_size=32, method="rtn")
    config = QuantizationConfig.parse("W4G128-asym-order-a8static-kv4-head8-embed4")
    assert config.weights == Weights(4, 128, symmetric=False, act_order=True)
    assert config.activations == Activations(8, static=True) and not config.activations.is_symmetric
    assert config.cache == Cache(4)
    assert config.head == Weights(8, method="rtn") and config.embedding == Weights(4, method="rtn")
    assert QuantizationConfig.parse("kv8").weights is None
    narrow = QuantizationConfig.parse("w4g32-bf16-a8asym")
    assert narrow.weights == Weights(4, 32, scales="bfloat16")
    assert narrow.activations == Activations(8, symmetric=False) and not narrow.activations.is_symmetric
    assert Activations(8).is_symmetric and not Activations(4).is_symmetric


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("w5", "weights of 5 bits"),
        ("w4g48", "group_size 48"),
        ("a6", "activations of 6 bits"),
        ("w4-a4asym", "'a4asym' in 'w4-a4asym': a4 has zero points already"),
        ("bf16-a8", "add a width such as w4"),
        ("kv2", "KV cache of 2 bits"),
        ("gptq", "add a width such as w4"),
        ("w4-nf4", "'nf4'"),
        ("w4-w8-rtn", "'w4' and 'w8' in 'w4-w8-rtn' both say the width of the weights: leave one of them out"),
        ("w4-w4g32", "both say the width of the weights"),
        ("w4-rtn-gptq", "'rtn' and 'gptq' in .* both say how weights are rounded"),
        ("a8-w4-a8static", "'a8' and 'a8static' in .* both say the width of activations"),
        ("kv4-kv8", "both say the width of keys and values"),
        ("w4-head8-head4", "both say the width of the head"),
        ("embed8-embed4", "both say the width of the token tables"),
        ("w4-distill-distill2", "both say what is learned"),
        ("w4-asym-asym", "both say the same"),
        ("w4-rtn-order", "'order' in 'w4-rtn-order' is GPTQ's"),
        ("w4-fisher-rtn", "'fisher' in 'w4-fisher-rtn' is GPTQ's"),
        ("a8-distill", "add a width such as w4"),
        ("w4-distill0", "no round of learning"),
        ("w4-rows", "name average_bits and a group_size"),
        ("w4-", "'' in 'w4-'"),
        ("", "'' in ''"),
        ("w8a8x", "the nearest is 'w8a8'; spinpass schemes lists all"),
        ("w4-hed8", "the nearest is 'head8'"),
        ("int4-head4", "'head8' and 'head4' in 'int4-head4' both say the width of the head"),
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


def test_what_calibration_changes() -> None:
    assert not any(QuantizationConfig.parse(scheme).uses_calibration for scheme in ("w4-rtn", "w8-rtn-a8-kv8-head8"))
    for scheme in ("w4", "a8static", "w8-rtn-a4", "kv4", "w4-rtn-distill"):
        assert QuantizationConfig.parse(scheme).uses_calibration, scheme
    assert not QuantizationConfig(None, Activations(4, clip=0.9)).uses_calibration


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: Weights(method="rtn", act_order=True), "act_order=True is GPTQ's"),
        (lambda: Weights(method="rtn", fisher=True), "fisher=True is GPTQ's"),
        (lambda: Weights(method="rtn", follow=True), "follow=True is GPTQ's"),
        (lambda: Activations(8, calibration="minmax"), "calibration='minmax' is of ranges that are fixed before"),
        (lambda: Activations(8, static=True, percentile=99.0), "percentile=99.0 changes nothing"),
        (lambda: QuantizationConfig(None, average_bits=3.0), "3.0 bits on average are those of weights"),
    ],
    ids=["act_order", "fisher", "follow", "calibration", "percentile", "average_bits"],
)
def test_settings_that_would_change_nothing(made: Callable[[], object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        made()


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_is_the_scheme_that_it_stands_for(name: str) -> None:
    assert QuantizationConfig.parse(name.upper()) == QuantizationConfig.parse(ALIASES[name])
    if "kv" not in name:
        assert QuantizationConfig.parse(f"{name}-kv8") == QuantizationConfig.parse(f"{ALIASES[name]}-kv8")


def test_every_part_that_is_listed_is_understood() -> None:
    for part in PARTS:
        alone = part.example in ("rows", "order", "fisher", "asym", "bf16", "gptq", "distill", "learn")
        given = {"rows": "w3.5g64-rows", "sinks": "kv4-sinks"}.get(part.example, f"w4-{part.example}" if alone else part.example)
        assert QuantizationConfig.parse(given) != QuantizationConfig(weights=None), part

"""Shrinking configurations: the rules, lists with a value per layer, sub-configurations, overrides."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

from benchmarks.zoo.shrink import (
    FF,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    RULES,
    VOCAB,
    at_most,
    at_most_or,
    if_above,
    if_set,
    tiny_rope,
    tiny_settings,
)


@dataclasses.dataclass
class Tower:
    sub_configs: ClassVar[dict[str, Any]] = {}
    model_type: ClassVar[str] = "tower"
    hidden_size: int = 1024
    image_size: int = 224

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Config:
    sub_configs: ClassVar[dict[str, Any]] = {"tower": Tower}
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 6
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    n_inner: int | None = None
    sliding_window: int | None = None
    eos_token_id: Any = 2
    pad_token_id: int | None = None
    dropout: float = 0.1
    layer_types: Any = ("window", "window", "full", "window", "window", "full")
    intermediate_size: Any = (1, 2, 3, 4, 5, 6)
    rope_parameters: Any = None
    tower: Any = dataclasses.field(default_factory=Tower)


@dataclasses.dataclass
class Latent(Config):
    kv_lora_rank: int = 512


def test_sizes_are_replaced_and_the_rest_is_left_alone() -> None:
    tiny = tiny_settings(Config, {}, {})
    assert (tiny["vocab_size"], tiny["hidden_size"], tiny["num_attention_heads"]) == (VOCAB, HIDDEN, HEADS)
    assert tiny["num_key_value_heads"] == KV_HEADS
    assert "dropout" not in tiny
    assert tiny["n_inner"] is None and tiny["sliding_window"] is None and tiny["pad_token_id"] is None
    Config(**tiny)


def test_the_kept_layers_show_every_kind() -> None:
    tiny = tiny_settings(dataclasses.make_dataclass("Two", [], bases=(Config,)), {}, {})
    assert tiny["num_hidden_layers"] == len(tiny["layer_types"]) == len(tiny["intermediate_size"])
    assert set(tiny["layer_types"]) == {"window", "full"}
    assert set(tiny["intermediate_size"]) == {FF}


def test_at_least_two_layers_are_kept() -> None:
    same = dataclasses.make_dataclass(
        "Same", [("layer_types", Any, ("full",) * 6), ("intermediate_size", Any, 99)], bases=(Config,)
    )
    assert tiny_settings(same, {}, {})["layer_types"] == ["full", "full"]


def test_overrides_win_here_and_in_sub_configurations() -> None:
    tiny = tiny_settings(Config, {"hidden_size": 48, "tower": {"image_size": 16}}, {"tower": {"hidden_size": 8}})
    assert tiny["hidden_size"] == 48
    assert tiny["tower"] == Tower(hidden_size=8, image_size=16)


def test_a_latent_cache_has_as_many_key_heads_as_heads() -> None:
    assert tiny_settings(Latent, {}, {})["num_key_value_heads"] == HEADS


def test_rope_settings_fit_the_heads() -> None:
    given = {"full": {"rope_type": "yarn", "original_max_position_embeddings": 4096}, "mrope_section": [16, 24, 24]}
    tiny = tiny_rope(given | {"long_factor": [1.0] * 64})
    assert tiny["full"] == {"rope_type": "yarn", "original_max_position_embeddings": 32}
    assert sum(tiny["mrope_section"]) * 2 == HEAD_DIM // 2
    assert len(tiny["long_factor"]) == HEAD_DIM // 2


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        (if_set(3), None, None), (if_set(3), 9, 3), (at_most(2), 1, 1), (at_most(2), 8, 2), (at_most(2), None, None),
        (at_most_or(2, missing=2), None, 2), (at_most_or(2, missing=2), 1, 1),
        (if_above(1, 2), 1, 1), (if_above(1, 2), 8, 2), (if_above(0, 8), None, None),
    ],
)  # fmt: skip
def test_rules(rule: Any, old: Any, new: Any) -> None:
    assert rule(old) == new


def test_one_rule_to_a_field() -> None:
    assert RULES["hidden_size"](4096) == HIDDEN and RULES["use_cache"](True) is False

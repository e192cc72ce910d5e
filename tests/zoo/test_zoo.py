"""Sampled types of the zoo: the smallest that between them show every kind of block, each exact in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.zoo import decoding, measure
from benchmarks.zoo.export import export
from benchmarks.zoo.models import build, model_types, randomise
from benchmarks.zoo.overrides import NOT_EXPORTABLE, OVERRIDES, SWITCHES
from benchmarks.zoo.states import SAME
from benchmarks.zoo.variants import export_variant

# type -> what it shows; with plain torch.export, which is the quickest way to a program
SAMPLED = {
    "llama": "RMSNorm, grouped heads, RoPE",
    "llama@tied": "one table for embedding and head",
    "gpt2": "LayerNorm with bias, fused qkv, weights stored transposed",
    "bert": "norms after the residual sum",
    "bloom": "a norm on the embedding, ALiBi",
    "gemma2": "norms on both sides, a cap on the scores",
    "qwen3": "norms on queries and keys",
    "cohere": "parallel attention and feed-forward, a norm without bias",
    "mixtral": "experts as grouped products, in-place operators",
    "minicpm3": "latent attention",
    "mamba2": "a state-space model: no attention",
}


@cache
def measured(arch: str) -> dict[str, Any]:
    program = export(*build(arch), ways=("torch",)).program
    return measure.measure(program, configs={"default": measure.CONFIGS["default"]})


@pytest.mark.parametrize("arch", SAMPLED)
def test_a_sampled_type_computes_the_same_function(arch: str) -> None:
    record = measured(arch)
    run = record["runs"]["default"]
    assert record["status"] == SAME, run
    assert run["dtype"] == "float64" and run["error"] <= 1e-9
    assert run["module_error"] <= run["own_bound"]
    assert run["streams"], "R1 was not found"


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "bert"])
def test_every_place_of_a_plain_decoder_is_rotated(arch: str) -> None:
    record = measured(arch)
    assert record["places"] == {"R2": 2, "R3": 2, "R4": 2}
    assert record["runs"]["default"]["covered"] == record["places"]


def test_one_program_with_its_cache_decodes_the_same_tokens() -> None:
    program = export_variant("gpt2", "decode").program
    assert decoding.takes_cache(program)
    run = measure.measure(program, configs={"default": measure.CONFIGS["default"]})["runs"]["default"]
    assert run["status"] == SAME and run["error"] <= 1e-9, run
    assert run["closed_loop_steps"] == 2
    assert run["greedy"]["tokens_equal"] and run["greedy"]["steps"] == decoding.STEPS
    assert run["greedy"]["error"] < 1e-5  # of storing rotated weights in float32


def test_a_model_has_no_trivial_parameter() -> None:
    model, inputs = build("gpt2")
    for name, p in model.named_parameters():
        assert p.numel() == 1 or float(p.detach().std()) > 0, name
    assert set(inputs) == {"input_ids", "attention_mask"}
    again, _ = build("gpt2")
    assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert any((p != q).any() for p, q in zip(model.parameters(), randomise(again, seed=1).parameters(), strict=True))


def test_the_tables_name_types_that_exist() -> None:
    known = set(model_types(switches=False))
    assert {name.split("@")[0] for name in SWITCHES} <= known
    assert set(NOT_EXPORTABLE) <= known
    parts = {"blt_local_encoder", "blt_local_decoder"}  # sub-configurations
    assert set(OVERRIDES) - parts <= known

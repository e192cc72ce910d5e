"""What a cache holds is rounded token by token, in the basis of heads: also where attention is spelled out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spinpass.execution import run
from spinpass.graph import ProgramEditor, shape
from spinpass.quantization import cache_sites, quantize
from tests.support import models

NAMES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "gptj", "phi3", "opt", "bloom", "falcon", "stablelm", "olmo2")
SPELLED_OUT = {"gemma2", "gptj", "bloom"}  # transformers has no other attention for them
CASES = [(name, how) for name in NAMES for how in ("eager", "sdpa") if how == "eager" or name not in SPELLED_OUT]


def exported(name: str, attention: str) -> Any:
    model = models.build(name, attention=attention)
    ids = torch.arange(9).view(1, 9) % 64
    return torch.export.export(model, (), {"input_ids": ids, "use_cache": False}), ids


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_no_token_depends_on_later_ones(name: str, attention: str) -> None:
    program, ids = exported(name, attention)
    made = quantize(program, "kv4")
    assert len(made.report.caches) == 4, "keys and values of two layers"
    other = ids.clone()
    other[:, -3:] += 7
    one, two = (run(made.program, {"input_ids": each, "use_cache": False})[0] for each in (ids, other))
    assert torch.equal(one[:, :-3], two[:, :-3]) and not torch.equal(one, two)
    before = run(program, {"input_ids": ids, "use_cache": False})[0]
    assert not torch.equal(before, one), "something is rounded"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_sites_are_the_same_however_attention_is_spelled(name: str) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        editor = ProgramEditor(exported(name, attention)[0])
        found.append(sorted(tuple(map(int, shape(node))) for node in cache_sites(editor)))
    assert found[0] == found[1]

"""Caches that attention writes into: the tokens and logits are those of caches that it makes anew, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from spinpass.exporters.onnx.integers.cache import quantize_cache
from spinpass.folders import export
from spinpass.runtime import DecoderGraph, OrtModel
from spinpass.runtime.model_folder import ModelFolder
from tests.support import folders


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_place")
    folders.model_folder(folder / "model", "qwen3", max_position_embeddings=1024)
    export(folder / "model", folder / "out", bits=16)
    return folder / "out"


@pytest.fixture(scope="module", params=[None, 8, 4])
def graph(request: pytest.FixtureRequest, out: Path, tmp_path_factory: pytest.TempPathFactory) -> DecoderGraph:
    """Of a cache of floats, and of integers."""
    if request.param is None:
        return DecoderGraph.open(out / "model.onnx", threads=1)
    folder = tmp_path_factory.mktemp("integers")  # of the file alone: spinpass.json lists another
    made = quantize_cache(out / "model.onnx", folder / "model.onnx", request.param, [list(range(3, 40))])
    return DecoderGraph.open(made.path, threads=1)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 80, shape, generator=torch.Generator().manual_seed(0))


def test_nothing_but_attention_reads_a_cache(out: Path) -> None:
    model = onnx.load(out / "model.onnx")
    readers = {node.op_type for node in model.graph.node for name in node.input if name.startswith("past")}
    assert readers == {"GroupQueryAttention"}
    told = json.loads((out / "genai_config.json").read_text())
    assert told["search"]["past_present_share_buffer"], "GenAI writes into them as well; the export has tried that"


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_return_the_same(graph: DecoderGraph, rows: int) -> None:
    """Over a prompt, tokens behind it, and caches that have grown twice."""
    assert graph.in_place
    anew = replace(graph, in_place=False)
    mine, other = graph.start(rows), anew.start(rows)
    prompt = tokens(rows, 250)
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    for ids, marks in [(prompt, mask), *((tokens(rows, 1) + k, None) for k in range(12))]:
        assert torch.equal(graph.step(ids, mine, marks), anew.step(ids, other, marks))
    for name, held in graph.held(mine).items():
        assert torch.equal(held, anew.held(other)[name]) and mine.cache[name].shape()[2] > held.shape[2] == 262


def test_several_tokens_on_a_cache_and_going_back(graph: DecoderGraph) -> None:
    anew = replace(graph, in_place=False)
    mine, other = graph.start(1), anew.start(1)
    for ids in (tokens(1, 300), tokens(1, 300) + 1):
        assert torch.equal(graph.step(ids, mine), anew.step(ids, other))
    assert graph.rewind(mine, 123) and anew.rewind(other, 123)
    for ids in (tokens(1, 40), tokens(1, 1)):
        assert torch.equal(graph.step(ids, mine), anew.step(ids, other))


def test_a_copy_goes_its_own_way(graph: DecoderGraph) -> None:
    state = graph.start(1)
    graph.step(tokens(1, 20), state)
    copied = state.copied()
    expected = replace(graph, in_place=False).step(tokens(1, 2), replace(state.copied(), cache=to_length(graph, state)))
    graph.step(tokens(1, 9) + 3, state)
    assert torch.equal(graph.step(tokens(1, 2), copied), expected)


def to_length(graph: DecoderGraph, state: object) -> dict[str, object]:
    from spinpass.runtime import to_ort

    return {name: to_ort(value) for name, value in graph.held(state).items()}  # type: ignore[arg-type]


def test_generate_continues_what_was_read_as_often_as_one_likes(out: Path) -> None:
    model = OrtModel.from_pretrained(out, threads=1, generation_config={})
    plain = OrtModel(replace(model.graph, in_place=False), ModelFolder(out), generation_config={})
    ids = tokens(1, 30)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True)
    for more in (tokens(1, 4), tokens(1, 4) + 1):
        given = torch.cat([first.sequences, more], 1)
        found = model.generate(given, max_new_tokens=6, past_key_values=first.past_key_values)
        assert torch.equal(found, plain.generate(given, max_new_tokens=6))

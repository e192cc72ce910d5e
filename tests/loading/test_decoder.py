"""Decoders as they are loaded: past their windows, past the switch of their frequencies, and in padded batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx as onnx_package
import pytest
import torch
from torch import Tensor

from spinpass.errors import ExportError
from spinpass.exporters import cache_names, onnx
from spinpass.loading import LoadedModel, load_model
from spinpass.loading.decoder import export_decoder
from spinpass.loading.faithful import check_faithful, text_limits
from spinpass.loading.rotary import rotary_in_graph
from spinpass.runtime import OrtModel
from tests.support import models

WINDOW = 8
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12,
             "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}  # fmt: skip
_NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "windowed": ("mistral", {"sliding_window": WINDOW}),
    "some layers windowed": ("gemma3_text", {"sliding_window": WINDOW}),
    "longrope": ("phi3", {"original_max_position_embeddings": 12, "rope_parameters": _LONGROPE}),
    "dynamic ntk": ("llama", {"max_position_embeddings": 16, "rope_parameters": _NTK}),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel, Path]:
    """The model of transformers, what is loaded of it, and the folder of its ONNX file."""
    name, config = CASES[request.param]
    model = models.build(name, **config)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    loaded = load_model(folder)
    out = folder / "onnx"
    onnx.export(loaded.program, out, fuse=True, **cache_names(loaded.program))
    return model, loaded, out


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(3, models.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def continued(model: Any, prompt: Tensor, count: int) -> list[int]:
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                          eos_token_id=-1, pad_token_id=0)  # fmt: skip
    found: list[int] = made[0, prompt.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("length", [3, 20])
def test_text_goes_on_as_in_transformers(case: Any, length: int) -> None:
    model, _, out = case
    count = 6 if length < 12 else 10  # where a prompt begins below the switch of the frequencies, it stays there
    prompt = ids(length, length)
    got = OrtModel.from_pretrained(out).generate(prompt, max_new_tokens=count, eos_token_id=[])
    assert got[0, length:].tolist() == continued(model, prompt, count)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_as_alone(case: Any, side: str, request: pytest.FixtureRequest) -> None:
    model, _, out = case
    rows = [ids(n, n)[0] for n in (14, 20, 17)]  # on one side of the switch, which is one for all rows of a call
    batch, mask = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.int64)
    for i, row in enumerate(rows):
        span = slice(20 - len(row), 20) if side == "left" else slice(0, len(row))
        batch[i, span], mask[i, span] = row, 1
    if "ntk" in request.node.callspec.params["case"]:
        pytest.skip("its frequencies depend on the longest row of a batch, in transformers too")
    got = OrtModel.from_pretrained(out).generate(batch, mask, max_new_tokens=6, eos_token_id=[])
    assert got[:, 20:].tolist() == [continued(model, row[None], 6) for row in rows]


def test_padding_behind_a_prompt_does_not_take_up_the_window(case: Any, request: pytest.FixtureRequest) -> None:
    """As ONNX Runtime GenAI has it: the padding stays between the prompt and what follows."""
    model, _, out = case
    if "windowed" not in request.node.callspec.params["case"]:
        pytest.skip("it has no window")
    graph = OrtModel.from_pretrained(out).graph
    short, long = ids(4, 1), ids(20, 2)
    prompt = torch.cat([torch.cat([short, torch.zeros(1, 16, dtype=torch.int64)], 1), long])
    mask = torch.ones_like(prompt)
    mask[0, 4:] = 0
    state = graph.start(2)
    logits = graph.step(prompt, state, mask)
    following = torch.stack([logits[0, 3].argmax(), logits[1, -1].argmax()])[:, None]
    made = [following]
    for _ in range(4):
        made.append(graph.step(made[-1], state)[:, -1].argmax(-1)[:, None])
    assert torch.cat(made, 1).tolist() == [continued(model, short, 5), continued(model, long, 5)]


def test_the_graph_takes_a_mask_and_whole_caches(case: Any) -> None:
    _, loaded, _ = case
    names = loaded.program.graph_signature.user_inputs
    assert "attention_mask" in names
    placeholders = {n.name: n.meta["val"] for n in loaded.program.graph.nodes if n.op == "placeholder"}
    assert all(placeholders[str(name)].ndim for name in names)  # no counters


def test_names_of_files_are_by_layer_and_role(case: Any) -> None:
    _, _, out = case
    graph = onnx_package.load(out / "model.onnx").graph
    caches = [f"{layer}.{role}" for layer in range(2) for role in ("key", "value")]
    assert {v.name for v in graph.input} >= {f"past_key_values.{c}" for c in caches}
    assert {v.name for v in graph.output} == {"logits", *(f"present.{c}" for c in caches)}
    axes = {d.dim_param for v in (*graph.input, *graph.output) for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert axes == {"batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"}
    nodes = {node.name for node in graph.node}
    assert "/model/layers.1/mlp/down_proj/MatMul" in nodes and not any("node_" in name for name in nodes)
    assert "model.layers.1.mlp.down_proj.MatMul.weight" in {v.name for v in graph.initializer}


def test_a_program_that_is_not_the_model_is_refused() -> None:
    model = models.build("llama")
    program = export_decoder(model)
    check_faithful(model, program, "m")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(ExportError, match="the program that transformers exports of m is not the model"):
        check_faithful(other, program, "m")


def test_rotary_modules_are_put_back() -> None:
    model = models.build("llama", rope_parameters=_NTK)
    with rotary_in_graph(model):
        assert "forward" in vars(model.model.rotary_emb)
    assert "forward" not in vars(model.model.rotary_emb)


def test_limits_of_a_text() -> None:
    assert text_limits(models.build("mistral", sliding_window=WINDOW).config) == [WINDOW]
    assert text_limits(models.build("llama").config) == []

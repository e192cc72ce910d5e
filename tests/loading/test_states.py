"""Decoders with other states than keys and values, with positions in a table, and those that take a token at a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx as onnx_package
import pytest
import torch
from torch import Tensor

from benchmarks.zoo.models import build, set_cache
from spinpass.errors import ExportError
from spinpass.exporters import cache_names, onnx
from spinpass.exporters.onnx.genai import genai_config
from spinpass.loading import LoadedModel, load_model
from spinpass.loading.decoder import export_decoder
from spinpass.loading.faithful import check_faithful
from spinpass.runtime import OrtModel

TYPES = {"lfm2": "a convolution's window beside keys and values", "mamba": "a loop over tokens", "gpt2": "a table"}


@pytest.fixture(scope="module", params=list(TYPES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, LoadedModel, Path]:
    """The type, the model of transformers, what is loaded of it, and the folder of its ONNX file."""
    model: Any = build(request.param)[0]
    set_cache(model, True)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    loaded = load_model(folder)
    onnx.export(loaded.program, folder / "onnx", fuse=True, **cache_names(loaded.program))
    return request.param, model, loaded, folder / "onnx"


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("rows", "length"), [(1, 3), (2, 12)])
def test_text_goes_on_as_in_transformers(case: Any, rows: int, length: int) -> None:
    _, model, _, out = case
    prompt = ids(rows, length)
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                          eos_token_id=-1, pad_token_id=0)  # fmt: skip
    assert torch.equal(OrtModel.from_pretrained(out).generate(prompt, max_new_tokens=6, eos_token_id=[]), made)


def test_states_have_the_names_of_their_layers(case: Any) -> None:
    name, _, loaded, out = case
    graph = onnx_package.load(out / "model.onnx").graph
    taken, returned = ({v.name for v in values} for values in (graph.input, graph.output))
    states = {
        "lfm2": ["0.state", "1.key", "1.value"],
        "mamba": ["0.state.0", "0.state.1", "1.state.0", "1.state.1"],
        "gpt2": ["0.key", "0.value", "1.key", "1.value"],
    }[name]
    assert {f"past_key_values.{s}" for s in states} == {n for n in taken if n.startswith("past")}
    assert {f"present.{s}" for s in states} == returned - {"logits"}
    assert not loaded.program.graph_signature.user_inputs_to_mutate


def test_one_token_at_a_call_is_said(case: Any) -> None:
    name, model, loaded, out = case
    notes = [note for note in loaded.report.notes if "one token at a call" in note]
    assert len(notes) == (name == "mamba")
    assert OrtModel.from_pretrained(out).graph.one_by_one == (name == "mamba")
    if name == "mamba":
        with pytest.raises(ExportError, match="ONNX Runtime GenAI"):
            genai_config(out / "model.onnx", model.config)


def test_a_state_that_is_dropped_is_noticed(case: Any) -> None:
    """The second piece of the text must be read on what the first has left."""
    name, model, _, _ = case
    if name != "lfm2":
        pytest.skip("one is enough")
    program = export_decoder(model)
    output = next(iter(reversed(program.graph.nodes)))
    old = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name in ("past_key_values_0", "cache_0"))
    logits, _, *rest = output.args[0]
    output.args = ((logits, old, *rest),)
    program.graph_signature.output_specs[1].arg.name = old.name
    with pytest.raises(ExportError, match="is not the model: reading 80 tokens in pieces"):
        check_faithful(model, program, "m")


def test_a_difference_beyond_a_chunk_is_noticed_where_layers_read_in_chunks(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, model, loaded, _ = case
    forward = model.forward

    def other(*args: Any, **inputs: Any) -> Any:
        made = forward(*args, **inputs)
        made.logits[:, 64:] += 1
        return made

    monkeypatch.setattr(model, "forward", other)
    if name == "lfm2":
        with pytest.raises(ExportError, match="reading 80 tokens in pieces gives other logits"):
            check_faithful(model, loaded.program, "m")
    else:  # keys and values grow, or there is but one token at a call: a short text tells as much
        check_faithful(model, loaded.program, "m")


def test_a_model_without_a_cache_says_so(tmp_path: Path) -> None:
    model: Any = build("openai-gpt")[0]
    model.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"keeps no cache from call to call: add --no-cache \(cache=False\)"):
        load_model(tmp_path)

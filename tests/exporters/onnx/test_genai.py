"""Text from exported folders in ONNX Runtime GenAI against transformers, and what its configuration refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from transformers import BloomConfig, GenerationConfig, LlamaConfig

import spinpass
from spinpass.errors import ExportError
from spinpass.exporters import names as onnx_names
from spinpass.exporters.onnx import genai
from spinpass.exporters.onnx import writer as exporter
from spinpass.exporters.onnx.integers.four_bits import quantize_4bit
from spinpass.loading.models import Companions
from spinpass.runtime.decoder import OrtDecoder
from tests.support import attention_graph, folders, models

og: Any = pytest.importorskip("onnxruntime_genai")
TEXT = "what is the weather like"


def generate(folder: Path, ids: list[int], count: int) -> list[int]:
    """Greedily, past end tokens."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, min_length=len(ids) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


def reference(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """What transformers generates under the same search."""
    made: Any = model
    with torch.no_grad():
        out = made.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return [int(token) for token in out[0, len(ids) :]]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("llama_tied")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rotated model, with all that belongs to it."""
    path = tmp_path_factory.mktemp("genai")
    program = spinpass.transform(models.export_hf_cache(model))
    exporter.export(program, path, **onnx_names.cache_names(program))
    Companions(model.config, model.generation_config, folders.letters_tokenizer()).save(path)
    genai.save_genai_config(path, model.config, model.generation_config)
    return path


def test_tokens_are_those_of_transformers(model: nn.Module, folder: Path) -> None:
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    ids = folders.letters_tokenizer()(TEXT)["input_ids"]
    assert [int(token) for token in tokenizer.encode(TEXT)] == ids and len(ids) >= 5
    for prompt in (ids, [5, 9, 17, 4, 33, 12]):
        expected = reference(model, prompt, 20)
        assert len(set(expected)) > 2 and generate(folder, prompt, 20) == expected
    assert tokenizer.decode(ids) == TEXT


def test_four_bit_weights(folder: Path, model: Any, tmp_path: Path) -> None:
    quantize_4bit(folder, tmp_path)
    Companions(model.config, model.generation_config, folders.letters_tokenizer()).save(tmp_path)
    genai.save_genai_config(tmp_path, model.config, model.generation_config)
    assert any(node.op_type == "MatMulNBits" for node in onnx.load(tmp_path / "model.onnx").graph.node)
    prompt = [5, 9, 17, 4, 33, 12]
    tokens = generate(tmp_path, prompt, 12)
    assert tokens == list(OrtDecoder(tmp_path).generate(prompt, 12, end=()).tokens)


def test_facts_of_graph_and_configuration(folder: Path, model: Any) -> None:
    found = genai.genai_config(
        folder / "model.onnx", model.config, GenerationConfig(eos_token_id=[7, 2], temperature=0.5, top_k=3)
    )
    decoder = found["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 12)
    assert (found["model"]["context_length"], found["model"]["vocab_size"]) == (64, 96)
    assert (found["model"]["eos_token_id"], found["model"]["pad_token_id"]) == ([7, 2], 0)
    assert {"temperature", "top_k", "max_length", "past_present_share_buffer"} == set(found["search"])
    assert found["search"]["past_present_share_buffer"] is False  # Concat makes every cache anew
    assert "attention_mask" not in decoder["inputs"]  # the graph has none
    assert json.loads((folder / genai.GENAI_CONFIG).read_text())["model"]["eos_token_id"] == 2


@pytest.mark.parametrize("shared", [True, False])
def test_attention_kernels_share_buffers(tmp_path: Path, shared: bool) -> None:
    attention_graph.save(tmp_path / "model.onnx")
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=64, eos_token_id=31)
    written = genai.save_genai_config(tmp_path, config)
    found = json.loads(written.read_text())
    assert found["search"]["past_present_share_buffer"] is True
    found["search"]["past_present_share_buffer"] = shared
    written.write_text(json.dumps(found))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 31}))
    expected = list(OrtDecoder(tmp_path).generate([3, 1, 4, 1, 5], 16, end=()).tokens)
    assert len(set(expected)) > 3 and generate(tmp_path, [3, 1, 4, 1, 5], 16) == expected


def test_a_cache_that_is_read_elsewhere_is_not_shared(tmp_path: Path) -> None:
    attention_graph.save(tmp_path / "model.onnx", length_of_cache=True)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, eos_token_id=31)
    found = genai.genai_config(tmp_path / "model.onnx", config)
    assert found["search"]["past_present_share_buffer"] is False


# -- refusals ---------------------------------------------------------------------------------------------------------


def graph(path: Path, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> Path:
    """A file with these inputs and outputs, and nothing between."""
    kind = onnx.TensorProto.FLOAT
    values = [[onnx.helper.make_tensor_value_info(n, kind, s) for n, s in part.items()] for part in (inputs, outputs)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", *values)), path)
    return path


IDS: dict[str, list[Any]] = {"input_ids": ["b", "s"]}
LOGITS: dict[str, list[Any]] = {"logits": ["b", "s", 8]}
CACHE: dict[str, list[Any]] = {f"past_key_values.0.{part}": ["b", 2, "p", 4] for part in ("key", "value")}
PRESENT: dict[str, list[Any]] = {f"present.0.{part}": ["b", 2, "t", 4] for part in ("key", "value")}
CONFIG = LlamaConfig(eos_token_id=1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        (IDS | {"cache_position": ["s"]} | CACHE, LOGITS | PRESENT, "this one takes input_ids, cache_position"),
        (CACHE, LOGITS | PRESENT, "gives a graph input_ids, attention_mask, position_ids and caches; this one takes "),
        (IDS | {"position_ids": [3, "b", "s"]} | CACHE, LOGITS | PRESENT, r"position_ids two axes; .* \[3, 'b', 's'\]"),
        (IDS, LOGITS, "needs a KV cache, .*; this graph takes none"),
        (IDS | {"past_key_values.1.key": ["b", 2, "p", 4]} | CACHE, LOGITS | PRESENT, "for every layer; this graph takes"),
        (IDS | CACHE | {"past_key_values.0.value": ["b", 2, "p", 8]}, LOGITS | PRESENT, "makes all caches alike"),
        (IDS | {name: ["b", "h", "p", 4] for name in CACHE}, LOGITS | PRESENT, "makes all caches alike"),
        (IDS | {name: ["b", "p", 4] for name in CACHE}, LOGITS | PRESENT, "makes all caches alike"),
        (IDS | CACHE, LOGITS, "needs logits and every cache back; this graph returns logits"),
        (IDS | CACHE, LOGITS | PRESENT | {"state": ["b", 3]}, "needs logits and every cache back"),
        (IDS | CACHE, PRESENT, "needs logits of a fixed size; model.onnx returns present.0.key, present.0.value"),
    ],
)  # fmt: skip
def test_graphs_that_genai_cannot_run(tmp_path: Path, inputs: Any, outputs: Any, reason: str) -> None:
    path = graph(tmp_path / "model.onnx", inputs, outputs)
    with pytest.raises(ExportError, match=reason):
        genai.save_genai_config(path, CONFIG)
    assert not (tmp_path / genai.GENAI_CONFIG).exists()


def test_configurations_that_say_too_little(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", IDS | CACHE, LOGITS | PRESENT)
    with pytest.raises(ExportError, match="needs an end token: set eos_token_id"):
        genai.genai_config(path, LlamaConfig(eos_token_id=None))
    with pytest.raises(ExportError, match="needs one max_position_embeddings; the configuration says None"):
        genai.genai_config(path, BloomConfig(eos_token_id=1))
    with pytest.raises(ExportError, match="there is no model at"):
        genai.genai_config(tmp_path / "other.onnx", CONFIG)

"""The ONNX Runtime decoder against the model it was exported from, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spinpass.errors import ConfigError, ExportError
from spinpass.exporters import names as onnx_names
from spinpass.exporters.onnx import writer as exporter
from spinpass.runtime import ModelFolder, decoding
from spinpass.runtime.decoder import OrtDecoder
from spinpass.runtime.penalties import Said
from spinpass.runtime.sampling import Sampling
from tests.support import models

PROMPT = (5, 9, 17, 4, 33, 12)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("llama_tied")


@pytest.fixture(scope="module")
def program(model: nn.Module) -> ExportedProgram:
    return models.export_hf_cache(model)


@pytest.fixture(scope="module")
def folder(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder")
    exporter.export(program, path, **onnx_names.cache_names(program))
    return path


@pytest.fixture(scope="module")
def decoder(folder: Path) -> OrtDecoder:
    return OrtDecoder(folder, threads=1)


def reference(model: nn.Module, count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_greedy_tokens_are_those_of_the_model(model: nn.Module, decoder: OrtDecoder) -> None:
    result = decoder.generate(PROMPT, 20)
    assert list(result.tokens) == reference(model, 20)
    assert (result.prompt_tokens, result.decoded, result.finished) == (6, 19, False)
    assert result.prefill_rate > 0 and result.decode_rate > 0


def test_names_do_not_matter(model: nn.Module, program: ExportedProgram, tmp_path: Path) -> None:
    report = exporter.export(program, tmp_path / "a.onnx")  # cache_0 -> output.cache_0
    count = len(report.outputs)
    exporter.export(program, tmp_path / "b.onnx", output_names=[f"o{i}" for i in range(count)])  # by order
    for name in ("a.onnx", "b.onnx"):
        assert list(OrtDecoder(tmp_path / name).generate(PROMPT, 5).tokens) == reference(model, 5)


def test_fixed_axes_may_be_named_by_their_size(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    import onnx

    file = onnx.load(folder / "model.onnx")
    named = [d for i in file.graph.input for d in i.type.tensor_type.shape.dim if d.HasField("dim_value")]
    assert len(named) == 2 * 4, "heads and their size, of keys and values in two layers"
    for dim in named:
        dim.dim_param = str(dim.dim_value)
    onnx.save(file, tmp_path / "model.onnx")
    assert list(OrtDecoder(tmp_path, threads=1).generate(PROMPT, 6).tokens) == reference(model, 6)


def test_logits(model: nn.Module, decoder: OrtDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    for chunk in (512, 4, 1):
        monkeypatch.setattr(decoding, "PROMPT_CHUNK", chunk)
        torch.testing.assert_close(decoder.logits(PROMPT), expected, atol=1e-4, rtol=1e-4)


def test_tokens_stream_and_stop_at_an_end_token(model: nn.Module, decoder: OrtDecoder) -> None:
    wanted = reference(model, 4)
    seen: list[int] = []
    result = decoder.generate(PROMPT, 20, end=[wanted[3]], on_token=seen.append)
    first = wanted.index(wanted[3])
    assert seen == list(result.tokens) == wanted[: first + 1]
    assert result.finished and result.decoded == first
    single = decoder.generate(PROMPT, 1)
    assert single.decode_rate == 0 and len(single.tokens) == 1


def test_end_tokens_come_from_the_folder(folder: Path) -> None:
    assert OrtDecoder(folder).end_tokens == frozenset()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert OrtDecoder(folder).end_tokens == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert OrtDecoder(folder).end_tokens == {2, 7}
    assert ModelFolder(folder).pad_token is None
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    assert ModelFolder(folder).pad_token == 0
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": 3}))
    assert ModelFolder(folder).pad_token == 3
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()


def test_sampling_follows_its_seed(decoder: OrtDecoder) -> None:
    def tokens(seed: int, **options: Any) -> tuple[int, ...]:
        return decoder.generate(PROMPT, 8, sampling=Sampling(temperature=2.0, seed=seed, **options)).tokens

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(4)}) > 1
    assert tokens(1, top_k=1) == decoder.generate(PROMPT, 8).tokens
    assert tokens(1, top_p=1e-9) == decoder.generate(PROMPT, 8).tokens


def test_sampling_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().expand(300, -1)
    generator = torch.Generator().manual_seed(0)
    nothing = Said(torch.zeros(300, 0, dtype=torch.int64), torch.zeros(300, 0, dtype=torch.bool))

    def drawn(**options: Any) -> set[int]:
        return set(Sampling(temperature=1.0, **options).choose(logits, nothing, generator).tolist())

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(min_p=0.35) == {0, 1} and drawn(min_p=0.25) == {0, 1, 2}
    assert drawn(top_k=3, top_p=0.55) == {0}  # of the three that are kept, the first holds 0.59 of the mass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is negative"),
        ({"top_k": -1}, "top_k -1 is negative; 0 keeps all"),
        ({"top_p": 0.0}, r"top_p 0.0 is not in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p 1.5 is not in \[0, 1\]"),
        ({"min_p": 0.5}, "min_p 0.5 is of draws, and temperature 0 draws nothing"),
    ],
)
def test_sampling_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_bad_requests(decoder: OrtDecoder) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens 0 is less than 1"):
        decoder.generate(PROMPT, 0)
    with pytest.raises(ConfigError, match="no tokens to start from"):
        decoder.generate([], 3)
    with pytest.raises(ConfigError, match="no tokens to start from"):
        decoder.logits([])


def test_no_tokenizer_and_no_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="holds no tokenizer: save one there"):
        _ = OrtDecoder(folder).tokenizer
    (folder / "tokenizer_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match="text needs the package transformers"):
        _ = OrtDecoder(folder).tokenizer
    (folder / "tokenizer_config.json").unlink()


def test_a_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(kinds.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    assert OrtDecoder(folder).tokenizer("b")["input_ids"] == [1]


def test_no_model_a_damaged_one_and_no_provider(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no model at .*model.onnx"):
        OrtDecoder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="cannot load model.onnx"):
        OrtDecoder(tmp_path)
    with pytest.raises(
        ConfigError, match="no provider 'WarpExecutionProvider' here; choose one of .*CPUExecutionProvider"
    ):
        OrtDecoder(folder, provider="WarpExecutionProvider")


def run_graph(
    forward: Callable[..., Any], path: Path, *inputs: Tensor, dynamic: dict[int, dict[int, Any]]
) -> OrtDecoder:
    """A decoder of a graph made for the purpose; `dynamic` says which axes of which input."""

    class Graph(nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return forward(*args)

    shapes = (tuple(dynamic.get(i, {}) for i in range(len(inputs))),)
    ep = torch.export.export(Graph(), inputs, dynamic_shapes=shapes)
    exporter.export(ep, path)
    return OrtDecoder(path)


BATCH, LENGTH, PAST = Dim("batch", min=2), Dim("length", min=2), Dim("past", min=2)
IDS = torch.randint(3, (2, 3))
CACHE = torch.randn(2, 5, 4)


def embed(ids: Tensor) -> Tensor:
    return ids[..., None].float().expand(-1, -1, 4)


def test_graphs_that_are_no_decoders(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has no cache inputs: export the graph that decodes"):
        run_graph(lambda ids: {"logits": embed(ids)}, tmp_path / "a.onnx", IDS, dynamic={0: {0: BATCH, 1: LENGTH}})
    with pytest.raises(ExportError, match="takes args_0, args_1: one input of token ids is expected"):
        run_graph(lambda ids, other: {"logits": embed(ids + other)}, tmp_path / "b.onnx", IDS, IDS, dynamic={})
    with pytest.raises(ExportError, match="the cache args_1 of shape .* has a fixed length"):
        run_graph(
            lambda ids, past: {"logits": embed(ids), "present": past + 1},
            tmp_path / "c.onnx", IDS, CACHE, dynamic={0: {0: BATCH, 1: LENGTH}, 1: {0: BATCH}},
        )  # fmt: skip
    with pytest.raises(ExportError, match="takes 1 cache tensors and returns 2: they cannot be matched"):
        run_graph(
            lambda ids, past: {"logits": embed(ids), "x": torch.cat([past, embed(ids)], 1), "y": past + 1},
            tmp_path / "d.onnx", IDS, CACHE, dynamic={0: {0: BATCH, 1: LENGTH}, 1: {0: BATCH, 1: PAST}},
        )  # fmt: skip
    with pytest.raises(ExportError, match="was exported for batches of 2: export it with a dynamic batch"):
        run_graph(
            lambda ids, past: {"logits": embed(ids), "x": torch.cat([past, embed(ids)], 1)},
            tmp_path / "e.onnx", IDS, CACHE, dynamic={0: {1: LENGTH}, 1: {1: PAST}},
        )  # fmt: skip

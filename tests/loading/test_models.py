"""From a folder, a GGUF file or a .pt2 file to a program."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ConfigError, ExportError
from spinpass.formats.pt2 import save_program
from spinpass.loading import models as loading
from spinpass.loading.models import load_model
from tests.support import folders, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.gguf_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def linear() -> ExportedProgram:
    return torch.export.export(torch.nn.Linear(64, 64), (torch.randn(2, 64),))


def test_folder_becomes_one_program_with_a_cache(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []
    loaded = load_model(folder, progress=steps.append)
    assert steps == ["load", "export", "compare"]
    assert capfd.readouterr().err == ""  # no bars, no warnings
    inputs = loaded.program.graph_signature.user_inputs
    assert inputs[3:] == tuple(f"{models.cache_argument()}_{i}" for i in range(4))
    assert next(iter(loaded.program.state_dict.values())).dtype == torch.float32
    assert loaded.companions is not None
    written = {path.name for path in loaded.companions.save(tmp_path / "out")}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= written
    assert written == {path.name for path in (tmp_path / "out").iterdir()}
    assert spinpass.transform(loaded.program) is not loaded.program


def test_prefill_only_and_dtype(folder: Path) -> None:
    program = load_model(folder, cache=False, dtype="bfloat16").program
    assert set(program.graph_signature.user_inputs) == {"input_ids", "attention_mask"}
    assert {t.dtype for t in program.state_dict.values()} == {torch.bfloat16}
    batch, length = next(n for n in program.graph.nodes if n.name == "input_ids").meta["val"].shape
    assert not isinstance(batch, int) and not isinstance(length, int)


def test_gguf_is_dequantized_and_can_be_saved(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(gguf, cache=False)
    assert capfd.readouterr().err == ""
    assert loaded.companions is not None and loaded.companions.tokenizer is None
    loaded.companions.save(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    weight = loaded.program.state_dict["model.layers.0.mlp.down_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    for shape in [(32, 32), (16, 32), (32, 32), (16, 32), (64, 32), (64, 32)]:
        torch.randn(shape, generator=generator)
    assert torch.equal(weight, torch.randn(32, 64, generator=generator))


def test_program_file_is_taken_as_it_is(linear: ExportedProgram, tmp_path: Path) -> None:
    save_program(linear, tmp_path / "linear.pt2")
    loaded = load_model(tmp_path / "linear.pt2")
    assert loaded.companions is None
    assert torch.equal(loaded.program.state_dict["weight"], linear.state_dict["weight"])


def test_loggers_and_bars_are_put_back(folder: Path) -> None:
    theirs = importlib.import_module("transformers.utils.logging")
    gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    before = (logging.root.manager.disable, theirs.is_progress_bar_enabled(), gguf.tqdm)
    with pytest.raises(ConfigError, match="there is no file or folder no-such-model-anywhere here"):
        load_model("no-such-model-anywhere")
    assert before == (logging.root.manager.disable, theirs.is_progress_bar_enabled(), gguf.tqdm)


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='int8' is not one of float32, float16, bfloat16, auto"):
        load_model(folder, dtype="int8")


def test_model_that_is_no_decoder(tmp_path: Path) -> None:
    model: Any = models.build("t5")
    model.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"T5\w+ \(model type t5\) is no causal language model") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_weights_that_are_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ExportError, match=f"{tmp_path}/model.safetensors is damaged: its header"):
        load_model(tmp_path)


def test_model_that_does_not_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporters = importlib.import_module("transformers.exporters")

    def fail(*_: object) -> None:
        raise RuntimeError("data-dependent branch\nat some line")

    monkeypatch.setattr(exporters.DynamoExporter, "export", fail)
    with pytest.raises(ExportError, match="cannot be exported: data-dependent branch$"):
        load_model(folder, cache=False)


@pytest.mark.parametrize(("module", "purpose"), [("transformers", "loading"), ("transformers.exporters", "exporting")])
def test_without_transformers(module: str, purpose: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(loading.importlib, "import_module", missing)
    with pytest.raises(
        ExportError, match=rf"{purpose} .* needs transformers 5 .*pip install 'spinpass\[transformers\]'"
    ):
        load_model(folder)

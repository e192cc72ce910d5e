"""GPTQ checkpoints on the command line: written for loaders that know no rotation, read back as floats when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spinpass.cli.app import app
from spinpass.errors import ConfigError
from spinpass.evaluation.scoring import ProgramScorer
from spinpass.formats.manifest import hashes
from spinpass.loading.models import load_model
from tests.support import folders

IDS = [3, 9, 4, 12, 7, 5, 16, 8]
OFFLINE = ("--rotations", "R1,R2", "--form", "offline", "--tied", "untie")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    result = run("export", model, out, "--to", "gptq", "--quantize", "w8g32-rtn", *OFFLINE)
    assert result.exit_code == 0, result.stderr
    assert "GPTQ checkpoint of" in result.stdout
    return out


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return ProgramScorer(load_model(folder, cache=False, **options).program).logits(IDS)


def test_a_checkpoint_is_a_model_of_its_own(model: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and config["quantization_config"]["bits"] == 8
    assert config["tie_word_embeddings"] is False
    original, read = logits(model), logits(checkpoint, dequantize=True)
    error = (read - original).abs().max() / original.abs().max()
    assert 1e-6 < error < 2e-2, "eight bits are near, and not the floats themselves"
    about = json.loads((checkpoint / "spinpass.json").read_text())
    assert about["files"] == hashes(checkpoint, about["files"]) and "model.safetensors" in about["files"]
    shown = run("inspect", checkpoint, "--check")
    assert shown.exit_code == 0 and "14 of 8 bits, groups of 32" in shown.stdout


def test_it_can_be_rotated_and_exported_again_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    refused = run("export", checkpoint, tmp_path / "no")
    assert refused.exit_code == 2 and "packed weights (gptq)" in refused.stderr and "--dequantize" in refused.stderr
    assert not (tmp_path / "no").exists()
    again = run("export", checkpoint, tmp_path / "again", "--dequantize", "--int4")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again" / "model.onnx").is_file()


def test_packed_weights_are_refused_in_python_too(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="not rotated behind your back"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--bits", "16"), "add --quantize"),
        (("--quantize", "w4-rtn-a8", *OFFLINE), "holds weights alone"),
        (("--quantize", "w3.5g16-rows", "--calibration", __file__, *OFFLINE), "one width each"),
        (("--quantize", "w4-rtn"), "know no online rotation, such as that of"),
        (("--quantize", "w4-rtn", "--kv-cache", "int8", "--calibration", __file__), "are ONNX Runtime's"),
        (("--int4",), "are ONNX Runtime's"),
    ],
)
def test_what_such_a_folder_cannot_hold(model: Path, tmp_path: Path, options: tuple[str, ...], why: str) -> None:
    result = run("export", model, tmp_path / "out", "--to", "gptq", *options)
    assert result.exit_code == 2 and why in result.stderr, result.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("name", "why"),
    [("gpt2", "the rotation adds"), ("cohere", "its architecture cannot hold this rotation"), ("gemma", None)],
)
def test_the_architecture_must_hold_what_is_folded(tmp_path: Path, name: str, why: str | None) -> None:
    """A bias made of a norm's, a norm without its mean; a norm whose weight is a distance from 1 is no hindrance."""
    folder, out = folders.model_folder(tmp_path / "model", name), tmp_path / "out"
    rotations = ("--rotations", "R1", "--form", "offline", "--tied", "untie")
    result = run("export", folder, out, "--to", "gptq", "--quantize", "w8-rtn", *rotations)
    assert (result.exit_code == 0) == (why is None), result.stderr
    if why is None:
        original, read = logits(folder), logits(out, dequantize=True)
        assert 1e-6 < (read - original).abs().max() / original.abs().max() < 5e-2
    else:
        assert why in result.stderr and not list(tmp_path.glob("out/*"))

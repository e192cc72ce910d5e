"""Folders for OpenVINO: written by a recipe, tried and scored there, opened again; and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from spinpass.cli.app import app
from spinpass.errors import VerificationError
from spinpass.folders import openvino as folder
from spinpass.folders import recipe_of
from spinpass.folders.judge import KERNEL_BOUND
from spinpass.formats import read_artefact, save_program
from tests.support import folders
from tests.support.commands import run

openvino = pytest.importorskip("openvino")

from spinpass.runtime import Conversation, OpenVINODecoder  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("written") / "out"
    made = run("export", model, written, "--to", "openvino", "--recipe", "quick", "--samples", 2)
    assert made.exit_code == 0, made.stderr
    assert "15 constants are integers; equivalent: at worst " in made.stdout
    assert "tried in openvino, openvino with its roundings left out: 48 tokens" in " ".join(made.stdout.split())
    return written


def test_a_recipe_becomes_a_folder_that_openvino_runs(out: Path) -> None:
    manifest = json.loads((out / "spinpass.json").read_text())
    assert {path.name for path in out.iterdir()} == {*manifest["files"], "spinpass.json"}
    assert {"openvino_model.xml", "openvino_model.bin", "tokenizer.json", "config.json"} < set(manifest["files"])
    told = manifest["openvino"]
    assert (told["path"], told["files"]) == ("openvino_model.xml", ["openvino_model.bin", "openvino_model.xml"])
    assert told["integers"] == 15 and told["certificate"]["ok"] and "attention_mask" in told["inputs"]
    assert {"past_key_values.0.key", "past_key_values.1.value"} < set(told["inputs"]) and "present.0.key" in told["outputs"]
    assert "openvino" in manifest["versions"] and manifest["record"]["certificate"]["ok"]
    nodes = openvino.Core().read_model(out / "openvino_model.xml").get_ops()
    kinds = {n.get_friendly_name(): n.get_element_type().get_type_name() for n in nodes if n.get_type_name() == "Constant"}
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "u4" and kinds["lm_head.weight"] == "i8"
    settings = yaml.safe_load((out / "recipe.yaml").read_text())
    scheme = recipe_of("quick", 4, "openvino").scheme
    assert (settings["to"], settings["quantize"], settings["samples"]) == ("openvino", scheme, 2)
    assert "last-logits" not in settings
    card = (out / "README.md").read_text()
    assert "library_name: openvino\n" in card and " for OpenVINO\n" in card and "- the file: equivalent: at worst" in card
    assert "decoder = OpenVINODecoder" in card and "$ spinpass chat ." in card


def test_it_is_tried_and_scored_there(out: Path) -> None:
    manifest = json.loads((out / "spinpass.json").read_text())
    trials = {(trial["runtime"], trial["case"]): trial for trial in manifest["trials"]}
    cases = ("prompt", "padded batch", "next turn")
    assert trials.keys() == {(runtime, case) for runtime in ("openvino", "openvino, unrounded") for case in cases}
    assert all(not trial["reason"] and trial["error"] <= trial["bound"] for trial in trials.values())
    assert trials["openvino", "prompt"]["bound"] == KERNEL_BOUND > 100 * trials["openvino, unrounded", "prompt"]["bound"]
    card = manifest["card"]
    assert card["runtime"] == "openvino" and 0.8 < card["ratio"] < 1.25 and card["decode"] > 0
    assert card["bytes"] == sum((out / name).stat().st_size for name in manifest["openvino"]["files"])


def test_it_is_inspected_generates_and_talks(out: Path) -> None:
    seen = run("inspect", out, "--check", "--with", out)
    assert seen.exit_code == 0, seen.stderr
    shown = " ".join(seen.stdout.split())
    assert "files are those that spinpass.json lists" in shown and "equivalent: at worst" in shown
    assert read_artefact(out).bases.keys() == read_artefact(out / "openvino_model.xml").bases.keys() != set()
    made = run("generate", out, "what is the weather", "--max-new-tokens", 5, "--json")
    assert made.exit_code == 0 and json.loads(made.stdout)["new_tokens"] > 0, made.stderr
    refused = run("generate", out, "what", "--max-new-tokens", 5, "--provider", "CUDAExecutionProvider")
    assert refused.exit_code == 2 and "--provider CUDAExecutionProvider is ONNX Runtime's, and openvino_model.xml" in refused.stderr
    talk = Conversation(OpenVINODecoder(out, threads=1), max_new_tokens=4)
    list(talk.answer("what is it"))
    list(talk.answer("or is it not"))
    assert talk.read > 0 and len(talk.turns) == 4
    chat = CliRunner().invoke(app, ["chat", str(out), "--threads", "1", "--json"], input="what is it\n")
    assert chat.exit_code == 0 and json.loads(chat.stdout)["turns"][0]["user"] == "what is it"


def test_it_is_evaluated_beside_the_model_that_it_was_made_of(model: Path, out: Path) -> None:
    found = run("eval", model, "--file", out, "--windows", 1, "--length", 24, "--json")
    assert found.exit_code == 0, found.stderr
    (made,) = json.loads(found.stdout)["files"].values()
    assert 0.8 < made["ratio"] < 1.25 and made["kl"] > 0


def test_a_damaged_folder_is_not_opened(out: Path, tmp_path: Path) -> None:
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = bytearray((tmp_path / "openvino_model.bin").read_bytes())
    weights[100] ^= 1
    (tmp_path / "openvino_model.bin").write_bytes(weights)
    with pytest.raises(VerificationError, match="openvino_model.bin is not the file that spinpass.json lists"):
        OpenVINODecoder(tmp_path)
    seen = run("inspect", tmp_path, "--check")
    assert seen.exit_code == 1 and "openvino_model.bin is not the file" in " ".join(seen.stderr.split())


def test_wrong_weights_never_appear(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is of the folder as it lies there, whatever the exporter has compared."""
    tools = folder.openvino_tools()
    layer = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy().tobytes()

    class Wrong:
        @staticmethod
        def export(program, path, /, **options):  # type: ignore[no-untyped-def]
            report = tools.export(program, path, **options)
            weights = report.path.with_suffix(".bin")
            assert layer in weights.read_bytes()
            weights.write_bytes(weights.read_bytes().replace(layer, bytes(len(layer))))
            return report

    monkeypatch.setattr("spinpass.folders.writers.openvino_tools", lambda: Wrong)
    made = run("export", model, tmp_path / "out", "--to", "openvino", "--bits", 16, "--rotations", "none")
    assert made.exit_code == 1 and "the written folder does not" in made.stderr and not (tmp_path / "out").exists()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(x)))


def test_a_program_that_is_no_decoder_is_called_once(tmp_path: Path) -> None:
    save_program(torch.export.export(Scaled(), (torch.randn(2, 64),)), tmp_path / "model.pt2")
    made = run("export", tmp_path / "model.pt2", tmp_path / "out", "--to", "openvino", "--quantize", "w8-rtn", "--rotations", "none", "--json")
    assert made.exit_code == 0, made.stderr
    told = json.loads(made.stdout)
    assert [(trial["runtime"], trial["case"]) for trial in told["trials"]] == [("openvino", "one call"), ("openvino, unrounded", "one call")]
    assert told["card"] == "not scored: there is no tokenizer to read a text with" and told["openvino"]["integers"] == 1

"""``spinpass export``: the folder that it writes."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from spinpass.runtime.decoder import OrtDecoder
from tests.support.commands import document, run
from tests.support.sweeps import quick


def test_export_writes_a_folder_that_runs(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path / "out", "--bits", 16, "--json")
    assert result.exit_code == 0, result.stderr
    data = document(result)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(data["files"])
    assert {"model.onnx", "tokenizer.json", "config.json", "generation_config.json", "spinpass.json"} <= names
    assert "genai_config.json" in names
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert {space["rotation"] for space in manifest["plan"]["spaces"]} == {"R1", "R2", "R3", "R4"}
    assert manifest["record"]["certificate"]["ok"] and manifest["onnx"]["certificate"]["ok"]
    assert manifest["versions"]["torch"] == version("torch") and manifest["packed"] is None
    assert manifest["genai"] == {"file": "genai_config.json", "reason": None}
    assert "present.0.key" in manifest["onnx"]["outputs"]
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4
    assert "load" in result.stderr and "certify" in result.stderr


def test_export_of_the_original_in_4_bits(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path, "--rotations", "none", "--int4", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "0 online Hadamards; not certified: switched off" in result.stdout
    manifest = json.loads((tmp_path / "spinpass.json").read_text())
    assert manifest["plan"] is None and manifest["record"] is None
    assert manifest["packed"]["matmuls"] > 0
    assert len(OrtDecoder(tmp_path).generate([5, 6, 7], 4, end=()).tokens) == 4


@pytest.mark.parametrize(
    "scheme",
    quick(
        ["w8-rtn-a8", "w4g16-gptq-a8static-kv8-head8-embed8", "w4g16-rtn-a8-distill2-head8", "w3.5g16-rtn-rows-a8"],
        only=["w4g16-gptq-a8static-kv8-head8-embed8", "w3.5g16-rtn-rows-a8"],
    ),
)
def test_export_of_a_quantized_model(folder: Path, tmp_path: Path, scheme: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon. " * 200)
    given = ["--quantize", scheme, "--calibration", text, "--samples", 2, "--no-verify"]
    result = run("export", folder, tmp_path / "out", *given)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert manifest["packed"]["bytes_after"] < manifest["packed"]["bytes_before"]
    assert len(manifest["quantization"]["weights"]) >= 14 and manifest["quantization"]["activations"]
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4


def test_export_calibrates_on_the_text_of_the_package(folder: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path / "out", "--quantize", "w4g16", "--samples", 2)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert all(w["method"] == "gptq" for w in manifest["quantization"]["weights"].values())


def test_export_needs_a_tokenizer_for_gptq(folder: Path, pt2: Path, tmp_path: Path) -> None:
    result = run("export", folder, tmp_path / "out", "--quantize", "w4-rtn", "--int4")
    assert result.exit_code == 2 and "--int4 rounds the weights by itself" in result.stderr
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 300)
    result = run("export", pt2, tmp_path / "out", "--quantize", "w4", "--calibration", text)
    assert result.exit_code == 2 and "has no tokenizer to read" in result.stderr
    assert not (tmp_path / "out").exists()


def test_export_of_a_program_has_no_tokenizer(pt2: Path, tmp_path: Path) -> None:
    result = run("export", pt2, tmp_path / "out", "--bits", 16, "--rotations", "R2,R4", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "spinpass.json", "recipe.yaml"}
    assert "R4:model.layers.*.mlp.down_proj (2×)" in result.stdout and "R1" not in result.stdout

"""``spinpass tune``: what it measures and writes."""

from __future__ import annotations

import json
from pathlib import Path

from spinpass.runtime.decoder import OrtDecoder
from tests.support.commands import document, run


def test_tune_measures_decides_and_writes(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon. " * 200)
    sizes = ["--samples", 1, "--windows", 2, "--length", 16, "--block-sizes", "4"]
    asked = ["tune", folder, "--quantize", "w4-rtn-a4", "--calibration", text, *sizes]
    found = document(run(*asked, "--json"))
    assert {t["name"].removesuffix(", where it helps") for t in found["trials"]} == {
        "none", "offline", "online", "online, across heads", "online, blocks of 4"
    }  # fmt: skip
    assert found["trials"][0]["name"] == "none" and found["chosen"] in {t["name"] for t in found["trials"]}
    result = run(*asked, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "Tuning for w4-rtn-a4" in result.stdout and "perplexity ×" in result.stdout
    manifest = json.loads((tmp_path / "out" / "spinpass.json").read_text())
    assert len(manifest["quantization"]["weights"]) >= 14 and manifest["packed"]["matmuls"] > 0
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4


def test_tune_says_what_is_wrong(folder: Path, pt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 300)
    given = ["--quantize", "a4", "--calibration", text]
    result = run("tune", folder, *given, "--block-sizes", "4,x")
    assert result.exit_code == 2 and "--block-sizes '4,x' is not a list of numbers: write them" in result.stderr
    result = run("tune", pt2, *given)
    assert result.exit_code == 2 and "has no tokenizer to read" in result.stderr
    result = run("tune", folder, *given, "--learn", "scale")
    assert result.exit_code == 2 and "'scale' is nothing that can be learned" in result.stderr
    result = run("tune", folder, *given, "--minutes", 3)
    assert result.exit_code == 2 and "--minutes 3 is of learning: add --learn scales" in result.stderr
    result = run("tune", folder, "--quantize", "a5", "--calibration", text)
    assert result.exit_code == 2 and "activations of 5 bits" in result.stderr

"""``spinpass eval``: models, programs and files, scored and compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.commands import document, run


def test_eval_scores_a_model(folder: Path, text: Path) -> None:
    result = run("eval", folder, "--text", text, "--windows", 4, "--length", 32, "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["tokens"] == 4 * 31 and found["perplexity"] > 1 and len(found["losses"]) == 4


def test_eval_compares_a_rotated_and_quantized_model_with_what_it_was(folder: Path, text: Path) -> None:
    common = ("eval", folder, "--text", text, "--windows", 3, "--length", 32, "--json")
    rotated = document(run(*common, "--rotate", "online"))
    assert rotated["ratio"] == pytest.approx(1, abs=1e-5) and rotated["agreement"] == 1.0 and rotated["kl"] < 1e-8
    quantized = document(run(*common, "--quantize", "w2-a4", "--calibration", text))
    assert quantized["kl"] > 1e-4 and quantized["ratio"] != 1.0
    shown = run(*common[:-1], "--quantize", "w8-rtn")
    assert shown.exit_code == 0 and "KL, nats" in shown.stdout


def test_eval_scores_what_onnx_runtime_runs(folder: Path, text: Path, tmp_path: Path) -> None:
    assert run("export", folder, tmp_path / "out", "--bits", 16).exit_code == 0
    result = run(
        "eval", tmp_path / "out", "--against", folder, "--text", text, "--windows", 2, "--length", 16, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert document(result)["ratio"] == pytest.approx(1, abs=1e-4)


def test_eval_scores_a_program_and_the_file_made_of_it_side_by_side(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    assert run("export", folder, out, "--quantize", "w4-rtn").exit_code == 0
    common = ("eval", folder, "--text", text, "--windows", 2, "--length", 16, "--file", out)
    both = document(run(*common, "--quantize", "w4-rtn", "--rotate", "auto", "--json"))
    assert both["kl"] > 1e-6 and both["files"][str(out)]["kl"] == pytest.approx(both["kl"], rel=1e-2)
    alone = document(run(*common, "--json"))
    assert alone["perplexity"] == both["before"]["perplexity"] and alone["files"] == both["files"]
    shown = run(*common)
    assert shown.exit_code == 0 and "÷ before" in shown.stdout and " out " in shown.stdout


def test_eval_reads_datasets_by_name(folder: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.csv").write_text("text\n" + "\n".join(text.read_text().split(" ")))
    common = ("eval", folder, "--windows", 2, "--length", 16, "--json")
    assert document(run(*common, "--dataset", data))["tokens"] == 2 * 15
    (data / "test.csv").write_text("a,b\nx,y\n")  # a stream of it knows no types before its first row
    for name, why in {f"{data}": "has no column 'text'", f"{data}::nosuch": "cannot be read"}.items():
        result = run(*common, "--dataset", name)
        assert result.exit_code == 2 and why in result.stderr, result.stderr


def test_eval_without_the_package_for_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("eval", folder, "--dataset", "wikitext")
    assert result.exit_code == 1 and "pip install 'spinpass[datasets]'" in result.stderr


def test_eval_says_what_is_missing(folder: Path, pt2: Path, text: Path, tmp_path: Path) -> None:
    wrong = {
        "leave out": (folder, "--against", folder, "--rotate", "auto"),
        "leave out --against": (folder, "--against", folder, "--file", folder),
        "leave out one of them": (folder, "--text", text, "--dataset", "wikitext"),
        "not a readable": (folder, "--text", tmp_path / "none.txt"),
        "--tokenizer": (pt2,),
        "the text has": (folder, "--text", text, "--windows", 999),
        "is not a part of a scheme": (folder, "--quantize", "w4-nf4"),
        "0 windows to calibrate on": (folder, "--quantize", "w4", "--calibration", text, "--samples", 0),
    }
    for why, arguments in wrong.items():
        result = run("eval", *arguments)
        assert result.exit_code == 2 and why in result.stderr, (why, result.stderr)

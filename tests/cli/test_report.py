"""``spinpass report`` as it is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from spinpass.cli import app as commands
from spinpass.formats import staging as files
from tests.support import folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.program_folder(tmp_path_factory.mktemp("model"))


def run(folder: Path, *arguments: object) -> Any:
    common = ("report", folder / "model.pt2", "--tokenizer", folder, "--text", folder / "text.txt")
    result = CliRunner().invoke(commands.app, [str(a) for a in (*common, "--windows", 2, "--length", 24, *arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_page_and_its_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    schemes = ("--scheme", "w4-gptq-a8", "--scheme", "kv4")
    result = run(folder, "-o", out, *schemes, "--form", "online", "--rotations", "R1,R4", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["out"] == str(out) and [p.name for p in out.parent.iterdir()] == ["page.html"]
    assert found["plan"]["config"]["form"] == "online" and {s["rotation"] for s in found["plan"]["spaces"]} == {
        "R1",
        "R4",
    }
    assert found["schemes"].keys() == {"w4-gptq-a8", "kv4"} and found["schemes"]["kv4"]["rotated"]["errors"] == {}
    assert found["unquantized"]["ratio"] == pytest.approx(1, abs=1e-5) and found["certificate"]["ok"]
    assert found["unquantized"]["before"]["tokens"] == 2 * 23 and not found["activations"]["unpaired"]
    assert {"load", "plan", "rotate", "certify", "score and watch", "quantize kv4, rotated"} <= found["seconds"].keys()
    page = out.read_text(encoding="utf-8")
    assert "Rotation of model.pt2" in page and "w4-gptq-a8" in page
    assert "score and watch" in result.stderr and "draw" in result.stderr


def test_a_report_without_a_scheme_or_a_certificate(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--out", tmp_path / "page.html", "--no-verify", "--exclude", "R4:*")
    assert result.exit_code == 0, result.stderr
    assert "page.html" in result.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No scheme was asked for" in page and "not certified" in page and "excluded by" in page


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rotations", "none"), "a report needs a rotation; choose from R1"),
        (("--scheme", "w4-nf4"), "'nf4' in 'w4-nf4' is not a part of a scheme"),
        (("--scheme", "w4", "--scheme", "w4"), "the scheme w4 is named twice"),
        (("--text", "missing.txt"), "missing.txt is not a readable UTF-8 text"),
        (("--scheme", "w4", "--calibration", "missing.txt"), "missing.txt is not a readable UTF-8 text"),
        (("--windows", "99"), "99 windows of 24 tokens need 2,376 tokens; the text has 400"),
        (("--windows", "9", "--scheme", "w4"), "18 windows of 24 tokens need 432 tokens"),
        (("-o", "."), ". is a folder; name a file in it, for example report.html"),
        (("--tokenizer", ""), "has no tokenizer; name a folder that has one with --tokenizer"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], reason: str, folder: Path, tmp_path: Path) -> None:
    result = run(folder, "-o", tmp_path / "page.html", *arguments)
    assert result.exit_code == 2, result.stderr
    assert reason in result.stderr and not list(tmp_path.iterdir())


def test_without_matplotlib(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("page", "sections", "pictures"):
        monkeypatch.delitem(sys.modules, f"spinpass.reporting.{name}", raising=False)
        monkeypatch.delattr(f"spinpass.reporting.{name}", raising=False)
    result = run(folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 1 and "a report needs matplotlib: pip install 'spinpass[report]'" in result.stderr
    assert "load" not in result.stderr


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    result = run(folder, "-o", tmp_path / "page.html")
    assert result.exit_code == 1 and "the folder is not writable" in result.stderr and "load" not in result.stderr


def test_an_onnx_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    result = CliRunner().invoke(commands.app, ["report", str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 2 and "is exported; a report needs the program it was made of" in result.stderr

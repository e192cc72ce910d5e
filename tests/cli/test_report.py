"""``spinpass report`` as it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spinpass import folders as written
from spinpass.cli import app as commands
from spinpass.formats import staging as files
from spinpass.runtime import trial
from tests.support import folders
from tests.support.warm import Warm


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
    assert found["out"] == str(out) and found["spinpass"] == "report" and [p.name for p in out.parent.iterdir()] == ["page.html"]
    assert found["plan"]["config"]["form"] == "online" and {s["rotation"] for s in found["plan"]["spaces"]} == {
        "R1",
        "R4",
    }
    assert found["schemes"].keys() == {"w4-gptq-a8", "kv4"} and found["schemes"]["kv4"]["rotated"]["errors"] == {}
    assert found["unquantized"]["ratio"] == pytest.approx(1, abs=1e-5) and found["certificate"]["ok"]
    assert found["unquantized"]["before"]["tokens"] == 2 * 23 and not found["activations"]["unpaired"]
    assert {"load", "plan", "rotate", "certify", "score and watch", "quantize kv4, rotated"} <= found["seconds"].keys()
    page = out.read_text(encoding="utf-8")
    assert "Rotation of model.pt2" in page and "<h1>w4-gptq-a8: " in page
    assert found["origin"]["command"].startswith("spinpass report ") and found["origin"]["command"].endswith("--rotations R1,R4 --json")
    assert found["origin"]["command"].replace("'", "&#x27;") in page and found["origin"]["date"] in page
    assert "score and watch" in result.stderr and "draw" in result.stderr


def test_a_report_without_a_scheme_or_a_certificate(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--out", tmp_path / "page.html", "--no-verify", "--exclude", "R4:*")
    assert result.exit_code == 0, result.stderr
    assert "page.html" in result.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>Rotation " in page and "Not certified" in page and "excluded by" in page and "Loss per layer" not in page


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


def test_exported_files_are_scored_and_timed(tmp_path: Path, warm: type[Warm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "Elsewhere", warm)
    model = folders.model_folder(tmp_path / "model", "llama", max_position_embeddings=64)
    written.export(str(model), tmp_path / "int8", config=None, bits=8, recipe="plain")
    (tmp_path / "text.txt").write_text(" ".join(f"w{k}" for k in range(200)), encoding="utf-8")
    common = ["report", str(model), "--text", str(tmp_path / "text.txt"), "--windows", "2", "--length", "16"]
    out = tmp_path / "report.html"
    result = CliRunner().invoke(commands.app, [*common, "--file", str(tmp_path / "int8"), "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    file = json.loads(result.stdout)["files"][str(tmp_path / "int8")]
    assert file["runtime"] == "ONNX Runtime" and file["decode_tokens_per_second"] > 0 and 0.8 < file["ratio"] < 1.2
    assert file["bytes"] == sum(p.stat().st_size for p in (tmp_path / "int8").glob("model.onnx*"))
    assert "tokens per second in ONNX Runtime" in out.read_text(encoding="utf-8")
    for arguments, reason in (
        (("--file", str(model)), "there is no exported model at"),
        (("--file", str(tmp_path / "int8"), "--file", str(tmp_path / "int8")), "is named twice: leave one out"),
    ):
        result = CliRunner().invoke(commands.app, [*common, *arguments])
        assert result.exit_code == 2 and reason in result.stderr


def test_two_reports_are_compared(folder: Path, tmp_path: Path) -> None:
    paths = []
    for form, keep in (("online", "--json"), ("offline", "--save")):
        paths.append(tmp_path / "kept" / f"{form}.json")
        one = run(folder, "-o", tmp_path / "one.html", "--scheme", "w4-rtn-a8", "--form", form, keep, *[paths[-1]] * (keep == "--save"))
        assert one.exit_code == 0, one.stderr
        if keep == "--json":
            paths[-1].parent.mkdir()
            paths[-1].write_text(one.stdout)
    common = ["report", *map(str, paths), "-o", str(tmp_path / "both.html")]
    result = CliRunner().invoke(commands.app, [*common, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["same_text"] and found["reports"] == ["online.json", "offline.json"]
    assert {row["what"] for row in found["differing"]} >= {"form", "command"}
    assert f"<h1>{found['verdict']}</h1>" in (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "both.html" in CliRunner().invoke(commands.app, common).stdout
    for arguments, reason in (
        (["report", str(paths[0])], "is the JSON of a report: name a second one to compare it with"),
        ([*common, "--scheme", "w4"], "two reports are compared as they are: leave out --scheme"),
        ([*common, "--save", "both.txt"], "a file whose name ends in .json"),
        ([*common, "--save", "both.json"], "two reports are compared as they are: leave out --save"),
        ([*common, "--form", "online"], "two reports are compared as they are: leave out --form"),
        (["report", str(folder), str(paths[0])], "there is no file"),
        (["report", str(paths[0]), "none.json"], "there is no file none.json"),
    ):
        result = CliRunner().invoke(commands.app, arguments)
        assert result.exit_code == 2 and reason in result.stderr, result.stderr


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

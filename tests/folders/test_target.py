"""An export replaces nothing but an earlier export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinpass.errors import ConfigError
from spinpass.folders import ExportRequest, carry_out, check_target
from spinpass.progress import Silent
from tests.support.commands import run


def exported_into(folder: Path, *more: str) -> Path:
    folder.mkdir()
    names = ["config.json", "model.onnx"]
    (folder / "spinpass.json").write_text(json.dumps({"files": {name: {} for name in names}}))
    for name in (*names, *more):
        (folder / name).touch()
    return folder


def test_absent_empty_or_its_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "absent", tmp_path / "empty", exported_into(tmp_path / "earlier", ".spinpass-a1b2")):
        check_target(out, "some/model", force=False)


@pytest.mark.parametrize("damage", ["", "[1]", "{}", "{"])
def test_files_of_others(tmp_path: Path, damage: str) -> None:
    out = exported_into(tmp_path / "out", "tokenizer.json")
    with pytest.raises(ConfigError, match="holds tokenizer.json, which no export .* add --force"):
        check_target(out, "some/model", force=False)
    (out / "spinpass.json").write_text(damage)
    with pytest.raises(ConfigError, match="holds config.json and 3 more"):
        check_target(out, "some/model", force=False)
    check_target(out, "some/model", force=True)


@pytest.mark.parametrize("out", ["model", "model/out", "model/../model", "model/a/b"])
def test_the_model_itself(tmp_path: Path, out: str) -> None:
    (tmp_path / "model").mkdir()
    for force in (False, True):
        with pytest.raises(ConfigError, match="is the model that is exported, or lies in it"):
            check_target(tmp_path / out, str(tmp_path / "model"), force=force)
    check_target(tmp_path / "model2", str(tmp_path / "model"), force=False)


def test_it_is_asked_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"holds keep.txt"):
        carry_out(ExportRequest("no/such", tmp_path, None), Silent())
    for command in (
        ("export", "no/such", tmp_path),
        ("tune", "no/such", "--quantize", "w4-rtn", "--calibration", tmp_path / "keep.txt", "--out", tmp_path),
    ):
        result = run(*command)
        assert result.exit_code == 2 and "holds keep.txt" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]

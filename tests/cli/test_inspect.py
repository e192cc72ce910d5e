"""``spinpass inspect`` on folders that others have made: nothing outside is opened, nothing in them reaches a terminal."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest

from spinpass.formats import hashes, sealed
from tests.support.commands import document, run

EVIL = "\x1b[31mred\x07\x9b0m[link=http://x]y[/link]\ud800"


def folder_of(folder: Path, manifest: dict[str, Any] | None = None, **more: Any) -> Path:
    """A folder with a model.pte, which says nothing of itself, and a manifest."""
    folder.mkdir(exist_ok=True)
    (folder / "model.pte").write_bytes(b"model")
    about = {"files": hashes(folder, ["model.pte"])} if manifest is None else manifest
    (folder / "spinpass.json").write_text(json.dumps(sealed(about | more)))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The real paths of everything that is opened."""
    names: list[str] = []
    for module, name in ((builtins, "open"), (os, "open")):
        real = getattr(module, name)

        def watched(path: Any, *args: Any, _real: Any = real, **options: Any) -> Any:
            if not isinstance(path, int):
                names.append(os.path.realpath(path))
            return _real(path, *args, **options)

        monkeypatch.setattr(module, name, watched)
    return names


@pytest.mark.parametrize("name", ["../secret", "{tmp}/secret", "a/../../secret", "..", "", "a\\b", "a\0b"])
def test_names_that_lead_out_of_the_folder(tmp_path: Path, opened: list[str], name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    named = name.format(tmp=tmp_path)
    folder = folder_of(tmp_path / "out")
    about = json.loads((folder / "spinpass.json").read_text())
    about["files"][named] = {"bytes": 6, "sha256": "0" * 64}
    folder_of(folder, about)
    for options in ((), ("--check",), ("--json", "--check")):
        result = run("inspect", folder, *options)
        assert result.exit_code == 1 and "which is no file of its folder" in result.stderr
    assert os.path.realpath(tmp_path / "secret") not in opened


@pytest.mark.parametrize("name", ["config.json", "model.pte", "spinpass.json"])
def test_links_that_lead_out_of_the_folder(tmp_path: Path, opened: list[str], name: str) -> None:
    folder = folder_of(tmp_path / "out")
    (folder / "config.json").write_text("{}")
    folder_of(folder, {"files": hashes(folder, ["model.pte", "config.json"])})
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    opened.clear()
    result = run("inspect", folder, "--check")
    assert result.exit_code == 1 and f"'{name}' leads out of" in result.stderr
    assert os.path.realpath(secret) not in opened


@pytest.mark.parametrize("where", ["initializer", "attribute", "function"])
def test_external_data_outside_the_folder(tmp_path: Path, where: str) -> None:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    inner = onnx.helper.make_graph([constant], "inner", [], [onnx.helper.make_tensor_value_info("c", 1, [1])])
    branch = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    graph = onnx.helper.make_graph(
        [branch] if where == "attribute" else [], "g", [], [], [tensor] if where == "initializer" else []
    )
    model = onnx.helper.make_model(graph)
    if where == "function":
        model.functions.append(onnx.helper.make_function("d", "f", [], ["c"], [constant], []))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    result = run("inspect", tmp_path)
    assert result.exit_code == 1 and "'../secret' leads out of" in result.stderr


@pytest.mark.parametrize(
    "about",
    [
        [], {"files": []}, {"files": {"model.pte": {}}}, {"files": {"model.pte": {"bytes": "5", "sha256": 0}}},
        {"record": [1]}, {"record": {"rotations": []}}, {"versions": []}, {"onnx": 3},
        {"onnx": {"certificate": [1]}}, {"quantization": {"weights": 1}}, {"record": {"certificate": {"ok": 1}}},
        {"cache": 4}, {"cache": {"scales": 1}},
    ],
    ids=range(13),
)  # fmt: skip
def test_manifests_of_other_kinds(tmp_path: Path, about: Any) -> None:
    folder = folder_of(tmp_path / "out")
    files = {"files": hashes(folder, ["model.pte"])}
    (folder / "spinpass.json").write_text(json.dumps(sealed(files | about) if isinstance(about, dict) else about))
    result = run("inspect", folder)
    assert result.exit_code == 1 and "spinpass.json is not what spinpass writes" in result.stderr


def controls(text: str) -> set[str]:
    return {c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000}


def test_what_a_folder_says_is_shown_as_text(tmp_path: Path) -> None:
    rotations = {f"space{EVIL}": EVIL}
    folder = folder_of(
        tmp_path / "out", None, model=EVIL, versions={EVIL: EVIL}, record={"rotations": rotations, "certificate": None},
        onnx={"certificate": {"verdict": EVIL}},
    )  # fmt: skip
    result = run("inspect", folder)
    assert result.exit_code == 0, result.stderr
    assert not controls(result.stdout) | controls(result.stderr)
    assert r"\x1b[31mred\x07\x9b0m[link=http://x]y[/link]\ud800" in result.stdout.replace("\n", "")
    shown = run("inspect", folder, "--json")
    assert document(shown)["model"] == EVIL and not controls(shown.stdout), "JSON has an escape for each"


def test_messages_and_the_name_of_the_folder_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "o\x1b[2Jut", {"files": {"model.pte": {"bytes": 1, "sha256": ""}}})
    for command in (("inspect", folder), ("inspect", folder, "--json"), ("inspect", tmp_path / "no\x1b]0;x\x07")):
        result = run(*command)
        assert result.exit_code in (1, 2) and r"\x1b" in result.stderr
        assert not controls(result.stdout) | controls(result.stderr)


def test_an_integer_cache_is_named(tmp_path: Path) -> None:
    shown = run("inspect", folder_of(tmp_path / "out", cache={"bits": 4}))
    assert "keys and values are integers of 4 bits" in shown.stdout, shown.stderr
    assert "integers of" not in run("inspect", folder_of(tmp_path / "other")).stdout

"""``spinpass learn``: matrices in a file, which export, plan and verify take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spinpass.errors import ConfigError, DamageError
from spinpass.formats import read_matrices
from spinpass.rotations import Rotation
from tests.support import folders
from tests.support.commands import document, run

SCHEME = "w4-asym-rtn-a4-kv4"


def text(tmp_path: Path, name: str = "text.txt", words: int = 6000) -> Path:
    file = tmp_path / name
    file.write_text(" ".join(folders.WORDS[(i * i + i // 7 + len(name)) % len(folders.WORDS)] for i in range(words)))
    return file


def test_matrices_are_learned_and_exported(tmp_path: Path) -> None:
    model, out = folders.model_folder(tmp_path / "model"), tmp_path / "bases.json"
    asked = ("learn", model, out, "--quantize", SCHEME, "--form", "online", "--calibration", text(tmp_path), "--rounds", 3)
    asked = (*asked, "--kinds", "transforms", "--text", text(tmp_path, "other.txt"))
    (tmp_path / "bases.learning.md").write_text("notes")
    made = run(*asked, "--json")
    assert made.exit_code == 0, made.stderr
    told = document(made)
    (learning,) = told["learning"]
    assert learning["kinds"] == ["transforms"] and learning["after"] < learning["before"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bases.json", "bases.learning.md", "model", "other.txt", "text.txt"], "nothing else is left"
    matrices = read_matrices(out)
    assert sorted(matrices) == told["spaces"] and all(isinstance(each, Rotation) for each in matrices.values())
    assert json.loads(out.read_text())["about"]["scheme"] == SCHEME
    options = ("--form", "online", "--matrices", out, "--quantize", SCHEME)
    exported = run("export", model, tmp_path / "folder", *options)
    assert exported.exit_code == 0, exported.stderr
    plan = json.loads((tmp_path / "folder" / "spinpass.json").read_text())["plan"]
    kinds = {space["name"]: space["matrix"] for space in plan["spaces"]}
    assert all(kinds[name].startswith("kronecker(") for name in matrices)
    planned = run("plan", model, "--form", "online", "--matrices", out)
    assert planned.exit_code == 0 and "kronecker" in planned.stdout and "invertible" in planned.stdout


def test_matrices_for_heads_and_scales_of_gates_are_learned_and_exported(tmp_path: Path) -> None:
    model, out = folders.model_folder(tmp_path / "model"), tmp_path / "bases.json"
    asked = ("learn", model, out, "--quantize", SCHEME, "--form", "online", "--kinds", "stacks, gates")
    made = run(*asked, "--calibration", text(tmp_path, words=800), "--text", text(tmp_path, "other.txt", 1500), "--phase", "full")
    assert made.exit_code == 0, made.stderr
    kinds = {space.split(":")[0]: str(each) for space, each in read_matrices(out).items()}
    assert kinds == {"R2": "2 matrices(12)", "gates": "diagonal(80)"}
    assert "OUT --form" in " ".join(made.stdout.split())
    for named in ((), ("--rotations", "R1,R2,R4,gates")):
        planned = run("plan", model, "--form", "online", "--matrices", out, *named)
        assert planned.exit_code == 0 and "diagonal(80)" in planned.stdout, planned.stderr
    refused = run("plan", model, "--form", "online", "--matrices", out, "--rotations", "R1,R2,R4")
    assert refused.exit_code == 2 and "gates is not among the rotations" in " ".join(refused.stderr.split())


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    model, here = folders.model_folder(tmp_path / "model"), tmp_path / "bases.json"
    (tmp_path / "folder.json").mkdir()
    for options, why in (
        ((tmp_path / "folder.json", "--quantize", SCHEME), "folder.json is a folder"),
        ((here, "--quantize", SCHEME, "--rotations", "none"), "nothing is learned without a rotation"),
        ((tmp_path / "bases.bin", "--quantize", SCHEME), "does not end in .json"),
        ((here, "--quantize", "w4a"), "is not a part of a scheme"),
        ((here, "--quantize", SCHEME, "--rounds", 0), "0 rounds of learning"),
        ((here, "--quantize", SCHEME, "--kinds", "gate"), "'gate' is nothing that can be learned; the nearest is 'gates'"),
        ((here, "--quantize", SCHEME, "--kinds", "gates,scales"), "scales are learned of what is rounded"),
        ((here, "--quantize", "w8-rtn-a8static", "--kinds", "transforms", "--calibration", text(tmp_path)), "learn bases with ranges per token"),
        ((here, "--quantize", SCHEME, "--calibration", tmp_path / "no.txt"), "no.txt"),
        ((here, "--quantize", SCHEME, "--calibration", text(tmp_path), "--text", text(tmp_path)), "name two of them"),
    ):
        refused = run("learn", model, *options)
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr
        assert not here.exists()


def test_matrices_of_another_model_and_damaged_files_are_refused(tmp_path: Path) -> None:
    model, file = folders.model_folder(tmp_path / "model"), tmp_path / "bases.json"
    given = {"R4:model.layers.9.mlp.down_proj": Rotation.create("hadamard", 4).to_dict()}
    file.write_text(json.dumps({"spinpass": "matrices", "matrices": given}))
    refused = run("plan", model, "--matrices", file)
    assert refused.exit_code == 2 and "is no space of this program; the nearest is" in " ".join(refused.stderr.split())
    for content, error in (("{", DamageError), ("{}", ConfigError), ('{"spinpass": "matrices", "matrices": {"R1": {}}}', ConfigError)):
        file.write_text(content)
        with pytest.raises(error, match="bases.json"):
            read_matrices(file)


def test_keys_and_channels_are_balanced_where_nothing_else_is_asked_for(tmp_path: Path) -> None:
    model, out = folders.model_folder(tmp_path / "model"), tmp_path / "bases.json"
    asked = ("learn", model, out, "--form", "online", "--calibration", text(tmp_path, words=800), "--text", text(tmp_path, "other.txt", 1500))
    made = run(*asked, "--quantize", SCHEME, "--json")
    (course,) = document(made)["learning"]
    assert sorted([*course["kinds"], *course["dropped"]]) == ["balanced channels", "balanced keys"]
    assert course["kept"] is (course["after"] < course["before"]) is out.exists() is (made.exit_code == 0)
    channels = {n: m for n, m in read_matrices(out).items() if not n.startswith("R3")} if out.exists() else {}
    assert ("balanced channels" in course["kinds"]) is bool(channels)
    for name, each in channels.items():
        assert str(each).startswith("diagonal" if name.startswith("gates") else "scaled-hadamard")
    if out.exists():
        options = ("--form", "online", "--matrices", out, "--quantize", SCHEME)
        exported = run("export", model, tmp_path / "folder", *options)
        assert exported.exit_code == 0, exported.stderr


def test_queries_and_keys_are_balanced_before_anything_is_learned(tmp_path: Path) -> None:
    model, out = folders.model_folder(tmp_path / "model"), tmp_path / "bases.json"
    asked = ("learn", model, out, "--rotations", "R2,R3", "--calibration", text(tmp_path, words=800), "--text", text(tmp_path, "other.txt", 1500))
    made = run(*asked, "--quantize", "kv4", "--kinds", "balance", "--json")
    told = document(made)
    (course,) = told["learning"]
    assert made.exit_code == (0 if course["kept"] else 1) and course["kinds"] + course["dropped"] == ["balanced keys"]
    assert course["kept"] is (course["after"] < course["before"]) is out.exists()
    if out.exists():
        assert {name.partition(":")[0] for name in read_matrices(out)} == {"R3"}
    for options, why in (
        (("--quantize", "w4-rtn"), "balance is of the keys of a cache and of activations, and w4-rtn rounds neither: add kv4"),
        (("--quantize", "kv4", "--rotations", "R2"), "nothing of this program can be balanced"),
    ):
        refused = run(*asked, *options, "--kinds", "balance")
        assert refused.exit_code == 2 and why in " ".join(refused.stderr.split()), refused.stderr

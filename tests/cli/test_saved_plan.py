"""``--save`` and ``--plan``: what was decided once is carried out by every command that rotates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import spinpass
from spinpass.errors import ConfigError
from spinpass.folders import ExportRequest, export
from spinpass.formats import load_program, write_matrices
from spinpass.rotations import Rotation
from tests.support import folders
from tests.support.commands import document, run


@pytest.fixture(scope="module")
def saved(pt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with a matrix of its own, without what was excluded."""
    root = tmp_path_factory.mktemp("plan")
    size = next(s.size for s in spinpass.plan(load_program(pt2)).spaces if s.role == "R1")
    matrix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    write_matrices(root / "bases.json", {"R1:residual": Rotation.from_matrix(matrix)}, {})
    options = ("--matrices", root / "bases.json", "--exclude", "R4:*", "--save", root / "plan.json")
    told = document(run("plan", pt2, *options, "--json"))
    assert told["saved"] == str(root / "plan.json") and told["plan"]["spinpass"] == "plan"
    return root / "plan.json"


def test_a_saved_plan_is_carried_out_by_rotate(pt2: Path, saved: Path, tmp_path: Path) -> None:
    result = run("rotate", pt2, tmp_path / "x.pt2", "--plan", saved)
    assert result.exit_code == 0, result.stderr
    assert "learned(" in result.stdout and "excluded by 'R4:*'" in result.stdout
    expected = spinpass.transform(load_program(pt2), spinpass.load_plan(saved)).state_dict
    for name, tensor in load_program(tmp_path / "x.pt2").state_dict.items():
        assert torch.equal(tensor, expected[name])


def test_a_saved_plan_is_shown_by_plan(pt2: Path, saved: Path) -> None:
    told = document(run("plan", pt2, "--plan", saved, "--json"))["plan"]
    kept = json.loads(saved.read_text())
    assert [s["fingerprint"] for s in told["spaces"]] == [s["fingerprint"] for s in kept["spaces"]]
    assert "saved as" in run("plan", pt2, "--save", saved.with_name("other.json")).stdout


def test_a_saved_plan_is_exported(folder: Path, tmp_path: Path) -> None:
    options = ("--no-cache", "--exclude", "R4:*", "--kind", "random-hadamard", "--seed", 5)
    assert run("plan", folder, *options, "--save", tmp_path / "plan.json").exit_code == 0
    plan, exported = spinpass.load_plan(tmp_path / "plan.json"), ("--no-cache", "--bits", 16, "--plan", tmp_path / "plan.json")
    told = document(run("export", folder, tmp_path / "out", *exported, "--json"))
    assert [s["fingerprint"] for s in told["plan"]["spaces"]] == [s.rotation.fingerprint() for s in plan.spaces]
    assert told["plan"]["config"]["seed"] == 5 and not (tmp_path / "out" / "recipe.yaml").exists()
    written = export(folder, tmp_path / "two", plan=plan, bits=16, cache=False).manifest
    assert written["plan"] == told["plan"]


def test_a_plan_of_another_model_is_refused_before_anything_is_written(tmp_path: Path, pt2: Path, saved: Path) -> None:
    model = folders.model_folder(tmp_path / "model", "llama", num_hidden_layers=1)
    for command in (("export", model, tmp_path / "out", "--bits", 16), ("plan", model)):
        result = run(*command, "--plan", saved)
        assert result.exit_code == 2 and "the plan is of another program: " in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_plan_and_other_rotations_disagree(pt2: Path, folder: Path, saved: Path, tmp_path: Path) -> None:
    for command in (("rotate", pt2, tmp_path / "x.pt2"), ("export", folder, tmp_path / "out"), ("plan", folder)):
        for option in (("--form", "online"), ("--rotations", "R1"), ("--exclude", "R4:*")):
            result = run(*command, "--plan", saved, *option)
            assert result.exit_code == 2 and "--plan has rotations of its own" in result.stderr, (command, option)
    given: object = {"spinpass": "plan"}
    with pytest.raises(ConfigError, match="plan is a dict: give what spinpass.load_plan returns"):
        ExportRequest("m", tmp_path, spinpass.RotationConfig(), plan=given)  # type: ignore[arg-type]


def test_a_plan_stands_in_place_of_what_a_file_of_options_says(folder: Path, tmp_path: Path) -> None:
    assert run("plan", folder, "--no-cache", "--rotations", "R4", "--save", tmp_path / "plan.json").exit_code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rotations: R1\nform: online\nbits: 16\nno-cache: true\n")
    options = ("export", folder, tmp_path / "out", "--config", recipe)
    told = document(run(*options, "--plan", tmp_path / "plan.json", "--json"))
    assert {s["rotation"] for s in told["plan"]["spaces"]} == {"R4"}
    recipe.write_text(f"plan: {tmp_path / 'plan.json'}\nbits: 16\nno-cache: true\n")
    told = document(run(*options, "--rotations", "R2", "--force", "--json"))
    assert {s["rotation"] for s in told["plan"]["spaces"]} == {"R2"}

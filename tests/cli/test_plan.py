"""``spinpass plan``: what it shows and what it refuses."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from spinpass.cli.export import export_command
from spinpass.cli.plan import plan_command
from spinpass.formats.pt2 import save_program
from tests.support.commands import document, run


def test_options_reach_the_configuration(pt2: Path) -> None:
    options = ("--rotations", "R4,R1", "--block-size", "16", "--form", "online", "--tied", "keep", "--cache", "plain")
    data = document(run("plan", pt2, *options, "--exclude", "*layers.0*", "--exclude", "R4:*layers.1*", "--json"))["plan"]
    config = data["config"]
    assert config["rotations"] == ["R1", "R4"] and config["exclude"] == ["*layers.0*", "R4:*layers.1*"]
    assert (config["block_size"], config["form"], config["tied"], config["cache"]) == (16, "online", "keep", "plain")
    assert {space["form"] for space in data["spaces"]} == {"online"}
    assert all("layers.0" not in space["name"] for space in data["spaces"])


def test_plan_groups_layers_unless_verbose(pt2: Path) -> None:
    short = run("plan", pt2)
    assert short.exit_code == 0 and "R2:model.layers.*.self_attn (2×)" in short.stdout
    long = run("plan", pt2, "-v")
    assert "R2:model.layers.1.self_attn" in long.stdout and "(2×)" not in long.stdout
    assert "FoldRotations" in long.stderr and "FoldRotations" not in short.stderr
    assert "FoldRotations" not in run("plan", pt2).stderr  # the log does not outlive its command


def test_plan_of_a_folder_and_refusals(folder: Path) -> None:
    result = run("plan", folder, "--no-cache", "--exclude", "R4:*")
    assert result.exit_code == 0, result.stderr
    assert "Refused" in result.stdout and "excluded by 'R4:*'" in result.stdout


def test_training_mode_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    save_program(torch.export.export(module, (torch.randn(2, 8),)), tmp_path / "x.pt2")
    result = run("plan", tmp_path / "x.pt2")
    assert result.exit_code == 1 and "dropout is active" in result.stderr


def test_it_says_what_an_export_takes(folder: Path) -> None:
    found = document(run("plan", folder, "--no-cache", "--bits", 16, "--memory", "1GB", "--json"))["forecast"]
    assert found["memory_margin"] == 0.3 and 0 < found["memory_bytes"] < 10**9 and found["seconds"] > 0
    assert [step["name"] for step in found["steps"]][:2] == ["load", "export"] and found["disk_bytes"] >= found["written_bytes"] > 0


def test_it_takes_what_changes_an_export(folder: Path) -> None:
    """Options of export that change memory, disk or time are options of plan."""
    of_export, of_plan = (set(inspect.signature(command).parameters) for command in (export_command, plan_command))
    only_written = {"out", "settings", "device", "last_logits", "no_fuse", "allow_partial", "force"}
    assert of_export - of_plan == only_written
    asked = ("plan", folder, "--no-cache", "--quantize", "w4g16-gptq-head8", "--samples", 1, "--json")
    assert document(run(*asked, "--keep", "*o_proj*", "--layer", "*down_proj*=w8"))["forecast"]["written_bytes"] > 0
    result = run(*asked, "--keep", "*o_porj*")
    assert result.exit_code == 2 and "'*o_porj*' is no linear layer or table of this program" in result.stderr
    result = run(*asked, "--layer", "x")
    assert result.exit_code == 2 and "--layer 'x' is not PATTERN=SCHEME" in result.stderr

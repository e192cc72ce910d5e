"""``spinpass verify``: programs and files that are one function, and others."""

from __future__ import annotations

from pathlib import Path

import torch

from spinpass.formats.pt2 import load_program, save_program
from tests.support.commands import document, run


def test_verify_finds_a_difference(pt2: Path, tmp_path: Path) -> None:
    other = load_program(pt2)
    with torch.no_grad():
        other.state_dict["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_program(other, tmp_path / "other.pt2")
    result = run("verify", pt2, tmp_path / "other.pt2")
    assert result.exit_code == 1
    assert "NOT equivalent" in result.stdout and "FAIL" in result.stdout


def test_verify_an_onnx_file_and_its_folder(pt2: Path, rotated: Path, tmp_path: Path) -> None:
    from spinpass.exporters.onnx import writer as onnx

    onnx.export(load_program(rotated), tmp_path / "out")
    for reference, target in ((rotated, tmp_path / "out"), (pt2, tmp_path / "out" / "model.onnx")):
        result = run("verify", reference, target)
        assert result.exit_code == 0, result.stderr
        assert "equivalent: at worst" in result.stdout
    assert document(run("verify", pt2, tmp_path / "out", "--json"))["ok"] is True

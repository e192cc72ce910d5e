"""``spinpass rotate``: the program that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spinpass
from spinpass import errors, record
from spinpass.folders import result as folder_module
from spinpass.formats.pt2 import load_program
from spinpass.rotations.rotation import Rotation
from tests.support.commands import document, run


def test_rotate_and_verify(pt2: Path, rotated: Path) -> None:
    found = record.read(load_program(rotated))
    assert found is not None and found.certificate is not None and found.certificate["ok"]
    result = run("verify", pt2, rotated)
    assert result.exit_code == 0, result.stderr
    assert "equivalent: relative error" in result.stdout and "logits" in result.stdout
    assert document(run("verify", pt2, rotated, "--json"))["ok"] is True


def test_rotate_prints_plan_certificate_and_file(pt2: Path, tmp_path: Path) -> None:
    result = run("rotate", pt2, tmp_path / "x.pt2", "--rotations", "R4", "--kind", "random-hadamard", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    for expected in ("random-hadamard(80, seed 3)", "Certificate", "equivalent", "x.pt2"):
        assert expected in result.stdout


def test_the_commands_do_what_the_functions_do(pt2: Path, rotated: Path) -> None:
    expected = spinpass.transform(load_program(pt2)).state_dict
    for name, tensor in load_program(rotated).state_dict.items():
        assert torch.equal(tensor, expected[name])


def test_failed_certificate(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.VerificationError("the programs are not equivalent: logits")

    monkeypatch.setattr(folder_module, "rotate", fail)
    result = run("rotate", pt2, tmp_path / "x.pt2")
    assert result.exit_code == 1 and "not equivalent: logits" in result.stderr


def test_rotate_does_not_replace_its_input(pt2: Path) -> None:
    before = pt2.read_bytes()
    result = run("rotate", pt2, pt2.parent / "." / pt2.name)
    assert result.exit_code == 2 and "is the program that is rotated: name another file" in result.stderr
    assert pt2.read_bytes() == before


def test_what_is_to_blame_is_named_or_left_out(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotations of R2 alone are wrong."""
    out, options = tmp_path / "x.pt2", ("--kind", "random-hadamard")
    sound = spinpass.plan(load_program(pt2), spinpass.RotationConfig(kind="random-hadamard"))
    guilty = next(s for s in sound.spaces if s.role == "R2")
    bad, real = guilty.rotation.fingerprint(), Rotation.apply

    def apply(self: Rotation, x: torch.Tensor, dim: int = -1, *, inverse: bool = False, dual: bool = False) -> torch.Tensor:
        return real(self, x, dim, inverse=inverse) * (1.01 if self.fingerprint() == bad else 1)

    monkeypatch.setattr(Rotation, "apply", apply)
    failed = run("rotate", pt2, out, *options)
    assert failed.exit_code == 1 and f"the space to blame is {guilty.name}: leave it out" in failed.stderr
    assert not out.exists()
    partial = document(run("rotate", pt2, out, *options, "--allow-partial", "--json"))
    left = [s["name"] for s in partial["plan"]["spaces"]]
    assert left == [s.name for s in sound.spaces if s is not guilty]
    monkeypatch.undo()
    assert run("verify", pt2, out).exit_code == 0

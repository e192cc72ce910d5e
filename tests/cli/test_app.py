"""What all commands share: exit codes, messages, the entry."""

from __future__ import annotations

import builtins
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from spinpass import cli
from spinpass.cli import app as commands
from spinpass.formats import staging as files
from spinpass.formats.pt2 import save_program
from tests.support.commands import document, run


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A program in which nothing can be rotated."""
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Sigmoid(), torch.nn.Softmax(-1)).eval()
    save_program(torch.export.export(module, (torch.randn(2, 16),)), tmp_path / "classifier.pt2")
    return tmp_path / "classifier.pt2"


def test_refused(classifier: Path, tmp_path: Path) -> None:
    for command in (("rotate", classifier, tmp_path / "x.pt2"), ("export", classifier, tmp_path / "out", "--bits", 16)):
        result = run(*command)
        assert result.exit_code == 1
        assert "spinpass: nothing was rotated: R1: the program has no residual stream" in result.stderr
        assert "Traceback" not in result.stderr and result.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"classifier.pt2"}
    result = run("plan", classifier)
    assert result.exit_code == 1 and "left alone" in result.stdout


def test_refused_in_json(classifier: Path, tmp_path: Path) -> None:
    data = document(run("rotate", classifier, tmp_path / "x.pt2", "--json"))
    assert (data["ok"], data["error"]) == (False, "RefusedError") and "nothing was rotated" in data["message"]
    assert document(run("plan", classifier, "--json"))["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plan", "missing.pt2"), "there is no file or folder missing.pt2"),
        (("rotate", "missing.pt2", "{tmp}/x.pt2"), "there is no file missing.pt2"),
        (("verify", "{pt2}", "missing.onnx"), "there is no file missing.onnx"),
        (("verify", "{pt2}", "{notes}"), "is neither a .pt2 nor an .onnx file"),
        (("rotate", "{pt2}", "{tmp}/x.onnx"), "x.onnx does not end in .pt2"),
        (("plan", "{notes}"), "is neither a .pt2 nor a .gguf file"),
        (("plan", "{pt2}", "--rotations", "R1,R7"), "unknown rotation 'R7'; choose from R1, R2, R3, R4"),
        (("plan", "{pt2}", "--rotations", "none"), "a plan needs a rotation; choose from R1,R2,R3,R4"),
        (("rotate", "{pt2}", "{tmp}/x.pt2", "--rotations", "none"), "rotate needs a rotation"),
        (("plan", "{pt2}", "--block-size", "7"), "7"),
        (("plan", "{pt2}", "--block-size", "0"), "block_size=0 is not a positive integer"),
        (("plan", "{pt2}", "--kind", "fourier"), "fourier"),
        (("plan", "{pt2}", "--dtype", "int3"), "int3"),
        (("plan",), "MODEL"),
        (("plan", "no-such-model-anywhere"), "transformers cannot load no-such-model-anywhere"),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], reason: str, pt2: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    places = {"pt2": pt2, "tmp": tmp_path, "notes": notes}
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 2
    assert reason in result.stderr and "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_a_file_in_the_way_is_no_usage(pt2: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    for arguments in (("rotate", pt2, notes / "x.pt2"), ("export", pt2, notes, "--bits", 16)):
        result = run(*arguments)
        assert result.exit_code == 1 and "a part of the path is a file" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_folder_that_cannot_be_written_is_found_before_the_work(pt2: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    for arguments in (("export", pt2, tmp_path / "out", "--bits", 16), ("rotate", pt2, tmp_path / "new" / "x.pt2")):
        result = run(*arguments)
        assert result.exit_code == 1 and "the folder is not writable" in result.stderr
        assert "load" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_full_disk(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    for arguments in (("export", pt2, tmp_path / "out", "--bits", 16), ("rotate", pt2, tmp_path / "x.pt2")):
        result = run(*arguments, "--no-verify")
        assert result.exit_code == 1 and "the disk is full" in result.stderr
    assert not list(tmp_path.iterdir())


def test_unexpected_errors_are_one_line_unless_asked(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("spinpass.cli.plan.plan", fail)
    result = run("plan", pt2)
    assert result.exit_code == 1
    assert "spinpass: unexpected ZeroDivisionError: division by zero; -vv shows where" in result.stderr
    assert isinstance(CliRunner().invoke(commands.app, ["plan", str(pt2), "-vv"]).exception, ZeroDivisionError)


def test_without_the_onnx_packages(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnx_names", "onnx_quantize", "onnx_compare"):
        monkeypatch.setitem(sys.modules, f"spinpass.exporters.{name}", None)
        monkeypatch.delattr(f"spinpass.exporters.{name}", raising=False)
    (tmp_path / "x.onnx").touch()
    for arguments in (("export", pt2, tmp_path / "out", "--bits", 16), ("verify", pt2, tmp_path / "x.onnx")):
        result = run(*arguments)
        assert result.exit_code == 1 and "pip install 'spinpass[onnx]'" in result.stderr


def test_version_and_help() -> None:
    result = run("--version")
    assert result.exit_code == 0 and f"torch {torch.__version__}" in result.stdout
    for command in ("export", "rotate", "plan", "verify", "eval", "report"):
        result = run(command, "--help")
        assert result.exit_code == 0 and "--json" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--verson",), "there is no option --verson; did you mean --version? see spinpass --help"),
        (("zzz",), "there is no command zzz; see spinpass --help"),
        (("export", "--quantise", "w4"), "there is no option --quantise; did you mean --quantize? see spinpass export --help"),
        (("plan", "--nothing"), "there is no option --nothing; see spinpass plan --help"),
        (("plan", "-q"), "there is no option -q; see spinpass plan --help"),
    ],
)
def test_a_wrong_word_is_told_its_neighbour(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"spinpass: {said}\n")
    told = document(run(*arguments, "--json"))
    assert (told["ok"], told["error"], told["message"]) == (False, "UsageError", said)


def test_every_command_shows_an_example() -> None:
    known: Any = typer.main.get_command(commands.app)
    for name, command in known.commands.items():
        assert re.search(rf"(?m)^Example: spinpass {name}\b", inspect.cleandoc(command.help)), f"spinpass {name} --help has no Example"
        assert f"Example: spinpass {name}" in run(name, "--help").stdout
    assert "Example: spinpass export" in run("--help").stdout


def completed(*words: str) -> list[str]:
    """What the shell is told to complete the last word with."""
    environment = {"_SPINPASS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    return CliRunner().invoke(commands.app, [], prog_name="spinpass", env=environment).stdout.split()


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed("spinpass", "rot") == ["rotate", "rotate-checkpoint"]
    assert completed("spinpass", "export", "--to", "o") == ["onnx", "openvino"]
    assert "--quantize" in completed("spinpass", "export", "--qu")
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    shown = CliRunner().invoke(commands.app, ["--show-completion"], prog_name="spinpass")
    assert shown.exit_code == 0 and "complete -o default -F _spinpass_completion spinpass" in shown.stdout
    assert "--install-completion" in run("--help").stdout


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_packages_of_the_command_line(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "app":  # from .app import app
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == f"spinpass: the command line needs {package}: pip install 'spinpass[cli]'\n"


def test_a_real_process(pt2: Path, rotated: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "spinpass", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = call("plan", pt2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["spaces"]
    done = call("rotate", pt2, "x.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "spinpass: x.onnx does not end in .pt2, the name of an exported program\n"

"""The command that optimum's command line gets: its options, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import typer.main

from spinpass.cli import app as commands
from spinpass.runtime.decoder import OrtDecoder
from tests.support import folders

pytest.importorskip("optimum.commands.optimum_cli")
register: Any = pytest.importorskip("optimum.commands.register.register_spinpass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


def optimum_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A process as users start it: the namespace is found, nothing is registered by hand."""
    code = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", code, "export", "spinpass", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)


def parsed(*arguments: str) -> list[str]:
    parser = ArgumentParser()
    register.SpinpassExportCommand.parse_args(parser)
    return list(register.arguments(vars(parser.parse_args(arguments))))


def test_it_writes_what_the_command_line_writes(folder: Path, tmp_path: Path) -> None:
    given = ["--rotations", "R1,R2,R3,R4", "--form", "offline", "--weights", "int4", "--no-verify", "--json"]
    done = optimum_cli("-m", folder, tmp_path / "out", *given)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] and document["packed"]["matmuls"] > 0
    assert {space["rotation"] for space in document["plan"]["spaces"]} == {"R1", "R2", "R3", "R4"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(document["files"])
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4


def test_every_option_of_the_export_is_there() -> None:
    export: Any = typer.main.get_command(commands.app).commands["export"]  # type: ignore[attr-defined]
    spelled = [name for option in export.params for name in (*option.opts, *option.secondary_opts)]
    theirs = {name for name in spelled if name.startswith("--")}
    parser = ArgumentParser()
    register.SpinpassExportCommand.parse_args(parser)
    ours = {name for name in parser._option_string_actions if name.startswith("--")}
    assert ours - {"--help", "--model", "--weights"} == theirs - {"--int4"}  # what --weights says


def test_options_become_those_of_the_export() -> None:
    assert parsed("-m", "a", "b") == ["export", "--", "a", "b"]
    given = ["--kind", "random-hadamard", "--seed", "-1", "--exclude", "x*", "--exclude", "-y", "--no-cache", "-vv"]
    with pytest.raises(SystemExit):
        parsed("-m", "a", "b", *given)  # -y is no pattern to argparse
    given[given.index("-y")] = "y"
    assert parsed("-m", "a", "b", *given) == [
        "export", "--kind=random-hadamard", "--seed=-1", "--exclude=x*", "--exclude=y", "--no-cache", "-v", "-v",
        "--", "a", "b",
    ]  # fmt: skip
    assert parsed("-m", "a", "b", "--weights", "int4")[1] == "--int4"
    assert parsed("-m", "a", "b", "--weights", "fp32")[1:3] == ["--bits", "16"]
    assert parsed("-m", "a", "b", "--weights", "int8")[1:3] == ["--quantize", "w8-rtn-head8-embed8"]


def test_it_fails_in_one_line(folder: Path, tmp_path: Path) -> None:
    done = optimum_cli("-m", tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == f"spinpass: there is no file or folder {tmp_path / 'nothing'}: check the path"
    done = optimum_cli("-m", folder, tmp_path / "out", "--rotations", "R9")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "R9" in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_ways_to_say_what_the_weights_become(folder: Path, tmp_path: Path) -> None:
    done = optimum_cli("-m", folder, tmp_path / "out", "--weights", "int8", "--quantize", "w4-rtn")
    assert done.returncode == 2
    assert "--weights and --quantize both say what the weights become: give one of them" in done.stderr


def test_optimum_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys; from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load\n"
        "print([c.COMMAND.name for c, parent in load() if parent.COMMAND.name == 'export'])\n"
        "print(sorted({'torch', 'typer', 'spinpass'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    names, heavy = done.stdout.splitlines()
    assert "spinpass" in names and heavy == "[]", done.stderr

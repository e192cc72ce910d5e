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
from spinpass.cli import command_options
from spinpass.errors import ConfigError
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


def filled() -> ArgumentParser:
    """The parser as it is when it has parsed something."""
    parser = ArgumentParser()
    register.SpinpassExportCommand.parse_args(parser)
    parser.parse_args(["-m", "a", "b"])
    return parser


def parsed(*arguments: str) -> list[str]:
    return list(register.arguments(vars(filled().parse_args(arguments))))


def test_it_writes_what_the_command_line_writes(folder: Path, tmp_path: Path) -> None:
    given = ["--rotations", "R1,R2,R3,R4", "--form", "offline", "--weights", "int4", "--no-verify", "--json"]
    done = optimum_cli("-m", folder, tmp_path / "out", *given)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] and document["packed"]["matmuls"] > 0
    assert {space["rotation"] for space in document["plan"]["spaces"]} == {"R1", "R2", "R3", "R4"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(document["files"])
    assert len(OrtDecoder(tmp_path / "out").generate([5, 6, 7], 4, end=()).tokens) == 4


def of_the_export() -> dict[str, Any]:
    """The options of ``spinpass export`` by every name that they have."""
    export: Any = typer.main.get_command(commands.app).commands["export"]  # type: ignore[attr-defined]
    options = [param for param in export.params if param.param_type_name == "option"]
    return {name: option for option in options for name in (*option.opts, *option.secondary_opts)}


def test_every_option_of_the_export_is_there_as_it_is_defined() -> None:
    parser = filled()
    ours = dict(parser._option_string_actions)
    assert {"-m", "--model", "-h", "--help", "--weights"} == ours.keys() - of_the_export().keys()
    assert not of_the_export().keys() - ours.keys()
    for name, option in of_the_export().items():
        takes_value = not (option.is_flag or option.count)
        assert (ours[name].nargs is None) is takes_value, name
        assert name in option.secondary_opts or str(ours[name].help).startswith(option.help.replace("%", "%%")), name
    text = " ".join(parser.format_help().split())
    assert "--to {onnx,openvino,executorch,gptq}" in text and "--memory SIZE" in text and "--seed N" in text


def test_an_option_that_the_export_gets_is_an_option_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from spinpass.cli import definitions

    new = definitions.CommandOption(("--dry",), None, "100% new.", False)
    listed = definitions.options_of
    monkeypatch.setattr(definitions, "options_of", lambda command: [*listed(command), new])
    assert parsed("-m", "a", "b", "--dry") == ["export", "--dry", "--", "a", "b"]
    assert "100% new." in filled().format_help()


def test_options_of_a_command_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="there is no command spinpass exprot: there are export, rotate"):
        command_options("exprot")


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


@pytest.mark.parametrize("given", [["--quantize", "w4-rtn"], ["--quantize=w4-rtn"], ["--int4"]])
def test_two_ways_to_say_what_the_weights_become(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = filled()
    read = parser.parse_args(["-m", "a", "b", "--weights", "int8", *given])
    command = register.SpinpassExportCommand(None, read, from_defaults_factory=True, parser=parser)
    with pytest.raises(SystemExit):
        command.run()
    word = given[0].split("=")[0]
    assert f"--weights and {word} both say what the weights become: give one of them" in capsys.readouterr().err


def test_an_option_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("-m", "a", "b", "--bitz=4")
    assert "there is no option --bitz: did you mean --bits?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("-m", "a", "b", "--nothing-like-it")
    assert "unrecognized arguments: --nothing-like-it" in capsys.readouterr().err


def test_optimum_starts_without_the_heavy_packages() -> None:
    """Not even for its help, which makes the parsers of all commands."""
    code = (
        "import sys; sys.argv = ['optimum-cli', 'export', '--help']; from optimum.commands.optimum_cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print(sorted({'torch', 'typer', 'spinpass'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert "Rotate a model (SpinQuant's R1-R4)" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_its_help_lists_the_options_of_the_export() -> None:
    done = optimum_cli("--help")
    assert done.returncode == 0 and "--rotations R1,R2,R3,R4" in done.stdout, done.stderr

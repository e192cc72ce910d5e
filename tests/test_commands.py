"""Every command that is printed, in a message, a docstring, help, the README, the site or beside it, is one that there is.

Commands are collected from all strings of the code and from the code spans and blocks of the documents. What is whole
(a line of the README's console blocks, an ``Example:``) is started, up to the moment at which a model would be loaded;
of what is only mentioned the command, its options and their values are looked up. What is of no known kind fails.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import typer.main

from benchmarks.imports import ROOT
from spinpass import plan
from spinpass.cli import app as commands
from spinpass.errors import ExportError, SpinpassError
from spinpass.formats import hashes, save_plan, sealed, write_matrices
from spinpass.rotations import Rotation
from tests.support import folders
from tests.support.commands import document, run
from tests.support.decoders import Decoder, exported, made, tokens

SOURCES = [path for top in ("spinpass", "optimum", "examples", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]
DOCUMENTS = [*(ROOT / name for name in ("README.md", "DESIGN.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMPARED_WITH = ("llama-cpp-python",)  # no package that this one needs
STARTS = re.compile(r"(spinpass (?!is|has)[a-z]+(?![\w.])|make [a-z]|python (-m )?[a-z]|pip install |optimum-cli |torchrun )")


def strings(path: Path) -> Iterator[str]:
    """All strings of a file; what is filled in later is an X."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "X" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def mentioned(text: str) -> Iterator[str]:
    """Commands in code spans of a docstring or a document, and what a message says to install."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    for span in re.findall(r"``([^`]+)``|(?<!`)`([^`]+)`(?!`)", text):
        found = " ".join("".join(span).split())
        if STARTS.match(found):
            yield found
    yield from (m.group().rstrip(" ,:;)") for m in re.finditer(r"(?<!`)pip install (--no-deps )?('[^']+'|[\w.=-]+)", text))


def whole(text: str) -> Iterator[str]:
    """The lines of console blocks and the examples of help, without comments and without brackets around what is optional."""
    lines = re.findall(r"^\s*Example: (.+)$", text, re.M) + re.findall(r"^\$ (.+)$", text, re.M)
    for line in lines:
        line = " ".join(re.sub(r"\s+# .*", "", line).split())
        if "[" in line and not line.startswith("pip "):  # whose brackets hold extras
            yield re.sub(r"\s*\[[^]]*\]", "", line)
            line = re.sub(r"[][]", "", line)
        yield line


MENTIONED = sorted({c for path in SOURCES for text in strings(path) for c in mentioned(text)} | {c for path in DOCUMENTS for c in mentioned(path.read_text(encoding="utf-8"))})
WHOLE = sorted({c for path in SOURCES for text in strings(path) for c in whole(text)} | {c for path in DOCUMENTS for c in whole(path.read_text(encoding="utf-8"))})


def options_of(command: str) -> dict[str, Any]:
    """The options of a command of spinpass by every name that they have, of spinpass itself where the name is empty.

    Fails where there is no such command.
    """
    known: Any = {**typer.main.get_command(commands.app).commands, "": typer.main.get_command(commands.app)}  # type: ignore[attr-defined]
    assert command in known, f"there is no command spinpass {command}"
    return {name: param for param in known[command].params for name in param.opts} | {"--help": None}


def choices_of(command: str, parameter: str) -> set[str]:
    """The values that a parameter is limited to by its annotation; none where it is not."""
    callback: Any = next(each.callback for each in commands.app.registered_commands if each.name == command)
    todo: list[Any] = [inspect.signature(callback, eval_str=True).parameters[parameter].annotation]
    found: set[str] = set()
    while todo:
        kind = todo.pop()
        if get_origin(kind) is Literal:
            found |= set(get_args(kind))
        elif get_origin(kind) is not None or isinstance(kind, UnionType):
            todo += [part for part in get_args(kind) if isinstance(part, type) or get_origin(part) is not None]
    return found


def looked_up(command: str) -> None:
    """Fail where the command is none that there is."""
    words = shlex.split(command)
    handler = {"spinpass": _spinpass, "make": _make, "python": _python, "pip": _pip, "optimum-cli": _optimum, "torchrun": _torchrun}[words[0]]
    handler(words[1:], command)


def _spinpass(words: list[str], command: str) -> None:
    if words[0].startswith("-"):
        words = ["", *words]
    options = options_of(words[0])
    rest = iter(words[1:])
    for word in rest:
        if not word.startswith("-"):
            continue
        assert word in options, f"{command}: spinpass {words[0]} has no {word}"
        param = options[word]
        if param is None or param.is_flag:
            continue
        value = next(rest, None)  # none where the option is only named
        allowed = choices_of(words[0], param.name)
        assert value is None or not allowed or value in allowed, f"{command}: {word} does not take {value!r}"


def _torchrun(words: list[str], command: str) -> None:
    assert "-m" in words, f"{command}: nothing that torchrun starts"
    started = " ".join(words[words.index("-m") + 1 :])
    looked_up(started if started.startswith("spinpass") else f"python -m {started}")


def _make(words: list[str], command: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name = word.split("=")[0]
        there = rf"\$[({{]{name}[)}}]" if "=" in word else rf"(?m)^{re.escape(name)}:"
        assert re.search(there, text), f"{command}: the Makefile has no {name}"


def _python(words: list[str], command: str) -> None:
    at = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
    found = [path for path in (ROOT / f"{at}.py", ROOT / at / "__main__.py") if path.is_file()]
    assert found, f"{command}: there is no {at}.py"
    text = "".join(path.read_text(encoding="utf-8") for path in (*found, ROOT / "benchmarks" / "texts.py") if path.is_file())
    asked = [word for word in words if word.startswith("--")]
    missing = [o for o in asked if f'"{o}"' not in text and not re.search(rf"(?m)^    {o[2:].replace('-', '_')}:", text)]
    assert not missing, f"{command}: {at} has no {missing}"


def _pip(words: list[str], command: str) -> None:
    names = ("pyproject.toml", "Makefile", "constraints.txt")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    packages = [word for word in words[1:] if not word.startswith("-")]
    assert packages, command
    for package in packages:
        name, extras = re.fullmatch(r"([\w.-]+?)(?:\[(.+)\])?(?:==.+)?", package).groups()  # type: ignore[union-attr]
        if name == "spinpass":
            for extra in set((extras or "").split(",")) - {"X", ""}:
                assert re.search(rf"(?m)^{extra} = \[", text), f"{command}: there is no extra {extra!r}"
        elif name not in (".", "X", *COMPARED_WITH):
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), f"{command}: {name} is no dependency"


def _optimum(words: list[str], command: str) -> None:
    assert words[:2] == ["export", "spinpass"], command
    there = {"--model", "--weights", *options_of("export")}  # which is what it is made of
    missing = [word for word in words if word.startswith("--") and word not in there]
    assert not missing, f"{command}: no {missing}"


@pytest.mark.parametrize("number", range(len(MENTIONED)))
def test_what_is_mentioned_is_there(number: int) -> None:
    looked_up(MENTIONED[number])


def test_the_collection_sees_commands() -> None:
    assert len(MENTIONED) > 40 and len(WHOLE) > 20
    assert "pip install 'spinpass[onnx]'" in MENTIONED and "make zoo" in MENTIONED and "spinpass tune" in MENTIONED
    assert "spinpass inspect out --check" in WHOLE and "spinpass inspect OUT" in WHOLE and "spinpass demo" in WHOLE
    assert list(mentioned("say ``spinpass plan --form online`` or pip install 'spinpass[x]', then")) == ["spinpass plan --form online", "pip install 'spinpass[x]'"]
    assert list(whole("$ spinpass plan M [--json]  # a plan")) == ["spinpass plan M", "spinpass plan M --json"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("spinpass exprot", "there is no command"),
        ("spinpass export --int5", "has no --int5"),
        ("spinpass export --to tflite", "--to does not take 'tflite'"),
        ("make everything", "the Makefile has no everything"),
        ("make accuracy SPEED2=x", "the Makefile has no SPEED2"),
        ("python -m benchmarks.nothing", "there is no benchmarks/nothing.py"),
        ("python -m benchmarks.gptq --nothing", "has no"),
        ("pip install 'spinpass[nothing]'", "there is no extra 'nothing'"),
        ("pip install no-such-package", "is no dependency"),
        ("optimum-cli export spinpass --int5", "no"),
        ("torchrun --nproc-per-node 2 -m spinpass exprot", "there is no command"),
        ("torchrun --nproc-per-node 2", "nothing that torchrun starts"),
    ],
)
def test_a_command_that_there_is_not_is_seen(command: str, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        looked_up(command)


def test_every_option_that_a_message_names_is_there() -> None:
    known: Any = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]
    there = {name for command in known.values() for param in command.params for name in (*param.opts, *param.secondary_opts)}
    there |= {"--help", "--version", "--model", "--weights"}
    there |= {"--no-deps", "--nproc-per-node", "--test"}  # of other programs: pip, torchrun, Olive
    named = {
        (option, path.name) for path in (ROOT / "spinpass").rglob("*.py") for text in strings(path)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)
    }  # fmt: skip
    assert len(named) > 30 and not {each for each in named if each[0] not in there}


# -- whole commands are started ----------------------------------------------------------------------------------------


class Reached(SpinpassError):
    """The command has come to the work: take nothing further from it."""


def reach(*_: object, **__: object) -> Any:
    raise Reached("take it from here")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything lies that the examples name."""
    root = tmp_path_factory.mktemp("desk")
    for name in ("model", "OUT", "ROTATED"):
        folders.model_folder(root / name, "llama", max_position_embeddings=2048)
    (root / "MODEL").symlink_to("model")
    (root / "OUT" / "model.onnx").write_text("no model")
    for written in (root / "OUT", root / "ROTATED"):
        names = [path.name for path in written.iterdir()]
        (written / "spinpass.json").write_text(json.dumps(sealed({"files": hashes(written, names)})))
    (root / "out").symlink_to("OUT")
    (root / "OTHER").symlink_to("OUT")
    for name in ("TEXT", "text.txt"):
        (root / name).write_text("what is the weather like if it is on and not in a " * 3000)
    (root / "recipe.yaml").write_text("rotations: none\nquantize: w4-rtn\n")
    for name in ("IN.pt2", "A.pt2", "B.pt2", "B.onnx", "model.pt2", "rotated.pt2", "offline.json", "online.json"):
        (root / name).write_text("no program")
    write_matrices(root / "bases.json", {"R1:residual": Rotation.from_matrix(torch.eye(32))}, {})
    torch.save({"R1": torch.eye(32)}, root / "R.bin")
    save_plan(plan(exported(made(Decoder(layers=1), dtype=torch.float32), (tokens(),))), root / "plan.json")
    return root


@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_what_is_whole_begins_to_work(number: int, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = WHOLE[number]
    looked_up(command)
    words = shlex.split(command)
    if words[0] == "optimum-cli":
        words = [*_as_export(words), "--force"]
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] != "spinpass" or words[1] == "schemes" or words[1].startswith("-"):  # which open nothing
        return
    for place in ("folders.making", "folders.checkpoint", "cli.learn", "cli.plan", "cli.tune", "cli.verify", "evaluation.scoring"):
        monkeypatch.setattr(f"spinpass.{place}.load_model", reach)
    for place in ("verify", "rotate"):
        monkeypatch.setattr(f"spinpass.cli.{place}.load_program", reach)
    monkeypatch.setattr("spinpass.cli.inspect.read_artefact", reach)
    monkeypatch.setattr("spinpass.reporting.comparison.read_object", reach)
    for place in ("cli.chat", "cli.generate"):
        monkeypatch.setattr(f"spinpass.{place}.open_decoder", reach)
    monkeypatch.setattr("spinpass.evaluation.request.read_dataset", lambda _: "what is the weather like " * 4000)
    monkeypatch.chdir(desk)
    result = run(*words[1:], "--json")
    told = document(result)
    absent = told["error"] == ExportError.__name__ and "pip install 'spinpass[" in told["message"]
    assert told["error"] == "Reached" or absent, f"{command}: {told['message']}"


def _as_export(words: list[str]) -> list[str]:
    register: Any = pytest.importorskip("optimum.commands.register.register_spinpass")
    from argparse import ArgumentParser

    parser = ArgumentParser()
    register.SpinpassExportCommand.parse_args(parser)
    return ["spinpass", *(word for word in register.arguments(vars(parser.parse_args(words[3:]))) if word != "--")]


def test_a_chain_of_them_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the pages that are cheap on a tiny model, one on what the other has written."""
    from spinpass.formats import save_program
    from tests.support import programs

    folders.model_folder(tmp_path / "MODEL", "llama", max_position_embeddings=256)
    save_program(programs.program("llama_tied", "hf", torch.float32), tmp_path / "IN.pt2")
    monkeypatch.chdir(tmp_path)
    for command in (
        "spinpass plan MODEL",
        "spinpass export MODEL OUT --int4",
        "spinpass inspect OUT --check",
        'spinpass generate OUT "Why is the sky blue?"',
        "spinpass rotate IN.pt2 OUT.pt2",
        "spinpass verify IN.pt2 OUT.pt2",
    ):
        result = run(*shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.stderr)

"""No control character of a file, a model or a library reaches stdout or stderr."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from spinpass.cli.plain import plain, plain_json, plain_streams
from spinpass.cli.screen import Screen
from tests.support.commands import run

ALL = "".join(map(chr, [*range(0x100), 0xD800, 0x20AC, 0xDFFF]))  # two halves in a row are a character in JSON
KEPT = {"\n", "\t"}


def controls(text: str) -> set[str]:
    return {c for c in text if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000} - KEPT


def test_every_control_character_is_its_number() -> None:
    assert not controls(plain(ALL))
    assert plain("\x1b\x00\x9b\r\ud800") == r"\x1b\x00\x9b\x0d\ud800"
    assert plain("tab\t, line\n, é, €, 中") == "tab\t, line\n, é, €, 中"


def test_json_stays_json() -> None:
    text = plain_json({ALL: [ALL]})
    assert not controls(text) and json.loads(text) == {ALL: [ALL]} and "€" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_all_that_a_screen_shows(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = kind(), kind()
    evil = "a\x1b]8;;http://x\x07b\x9bc[link=http://y]d[/]"
    screen = Screen(verbose=True, streams=(out, err))
    table = Table("name" + evil, title=evil, caption=evil)
    table.add_row(evil)
    screen.show(evil, table)
    screen.note(evil)
    screen.error(evil, "ConfigError")
    screen.piece(evil)
    with screen.steps() as steps:
        steps.start(evil)
    logging.getLogger("spinpass").info("found %s", evil)
    screen.close()
    for shown in (out.getvalue(), err.getvalue()):
        assert "\x1b]" not in shown and "\x9b" not in shown and "\x07" not in shown
        assert r"a\x1b]8;;http://x\x07b\x9bc[link=http://y]d[/]" in shown


def test_what_other_packages_print() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), plain_streams():
        print("a\x1b[31m", file=sys.stderr)
        print("b\x1b[31m")
    assert err.getvalue() == "a\\x1b[31m\n" and out.getvalue() == "b\\x1b[31m\n"


def test_tokens_of_generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def text(_: Any, write: Any) -> dict[str, Any]:
        for piece in ("one ", "\x1b[2J", "two\r", "\x9b3m"):
            write(piece)
        found: dict[str, Any] = {"prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0}
        return found | {"text": "one \x1b[2J", "prompt_tokens": 1, "new_tokens": 4}

    monkeypatch.setattr("spinpass.cli.generate.GenerateRequest.run", text)
    result = run("generate", tmp_path, "x")
    assert result.stdout == "one \\x1b[2Jtwo\\x0d\\x9b3m\n" and "1 + 4 tokens" in result.stderr
    shown = run("generate", tmp_path, "x", "--json")
    assert json.loads(shown.stdout)["text"] == "one \x1b[2J" and not controls(shown.stdout)


def test_tracebacks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spinpass", "inspect", str(tmp_path / "no\x1b[31m"), "-vv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and r"no\x1b[31m" in done.stderr
    assert not controls(done.stderr)

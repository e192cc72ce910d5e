"""Text that comes from files and models, made safe for a terminal: it shows what is there and obeys none of it."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any, cast

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # C0 without tab and newline, C1, half characters


def plain(text: str) -> str:
    """Return the text with every control character as its number, ``\\x1b``."""
    return _CONTROLS.sub(lambda found: _number(found.group()), text)


def plain_json(data: Any) -> str:
    """Return the JSON of the data; what JSON itself would leave as it is among control characters is escaped too."""
    return _escaped(json.dumps(data, indent=2, ensure_ascii=False))


def plain_line(data: Any) -> str:
    """Return the same JSON in one line."""
    return _escaped(json.dumps(data, ensure_ascii=False))


class PlainFormatter(logging.Formatter):
    """Formats log records, whose arguments are names in programs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text."""
        return plain(super().format(record))


@contextmanager
def plain_streams() -> Iterator[None]:
    """Make safe whatever is printed to stdout and stderr meanwhile, by other packages too."""
    out, err = (cast(IO[str], _PlainStream(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def print_traceback(error: Exception) -> None:
    """Print what Python prints of an error that nobody has caught."""
    sys.stderr.write(plain("".join(traceback.format_exception(error))))


class _PlainStream:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, and return its length."""
        self._stream.write(plain(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaped(document: str) -> str:
    return _CONTROLS.sub(lambda found: f"\\u{ord(found.group()):04x}", document)


def _number(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

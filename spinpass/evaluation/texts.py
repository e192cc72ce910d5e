"""Texts from files and datasets, and windows of their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from spinpass.errors import ConfigError, ExportError, first_line

Windows = Sequence[Sequence[int]]
"""Windows of a text, each as its token ids."""

_ENOUGH = 4_000_000  # characters of a dataset
_SENTENCE = 60  # characters that more is said in than a name
_MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "cmd", "codecs", "collections", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest", "email", "enum",
    "fileinput", "fractions", "functools", "gettext", "glob", "heapq", "html", "inspect", "itertools", "json",
    "locale", "logging", "mailbox", "math", "mimetypes", "operator", "optparse", "os", "pathlib", "pdb", "pickle",
    "pprint", "random", "sched", "shelve", "shlex", "shutil", "socket", "sqlite3", "statistics", "string", "struct",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback",
    "unittest", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file; Python's help texts for None. Raises ConfigError where it is unreadable or empty."""
    if path is None:
        return "\n\n".join(topics.values())
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"{path} is not a readable UTF-8 text ({why}): name another file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a readable UTF-8 text ({error.reason} at byte {error.start:,}): save it as UTF-8"
        ) from error
    except ValueError as error:  # a path that no file can have
        raise ConfigError(f"{str(path)!r} is no path ({error}): name another file") from error
    if not text.strip():
        raise ConfigError(f"{path} holds no text: name another file")
    return text


def library_docs() -> str:
    """What the standard library says of its functions and classes: prose of another source than :func:`read_text`'s."""
    found: dict[str, None] = {}
    for name in _MODULES:
        module = import_module(name)
        for named in [module, *(value for key, value in sorted(vars(module).items()) if not key.startswith("_"))]:
            text = inspect.getdoc(named) if callable(named) or named is module else None
            if text and len(text) > _SENTENCE:
                found[text] = None
    return "\n\n".join(found)


def read_dataset(name: str) -> str:
    """The documents of a dataset, ``NAME[:CONFIG[:SPLIT]]`` as the package datasets knows it, a hub name or a folder.

    Read are the first few million characters of its column ``text``, or of the only one that holds strings. The split
    is ``test`` where none is named.

    Raises:
        ConfigError: there is no such dataset or split, or no column of text.
        ExportError: the package is missing.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ExportError(
            f"reading {name} as a dataset needs the package {error.name}: pip install 'spinpass[datasets]', or name "
            "the file of a text"
        ) from error
    where, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(where, config or None, split=split or "test", streaming=True)
        columns = _string_columns(rows)
        if "text" not in columns and len(columns) != 1:
            raise ConfigError(f"the dataset {name} has no column 'text'; of strings it has {columns or 'none'}")
        column = "text" if "text" in columns else columns[0]
        return _joined(row[column] for row in rows)
    except ConfigError:
        raise
    except Exception as error:  # files, hub, builders: no common base below Exception
        raise ConfigError(
            f"the dataset {name} cannot be read: {first_line(error)}; name another, or the file of a text"
        ) from error


def _string_columns(rows: Any) -> list[str]:
    """The columns of strings, by the dataset's types, or by its first row where a stream knows no types before."""
    if rows.features:
        strings = ("string", "large_string")
        return [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in strings]
    return [name for name, value in next(iter(rows), {}).items() if isinstance(value, str)]


def _joined(documents: Iterable[str]) -> str:
    found, length = [], 0
    for document in documents:
        found.append(document)
        length += len(document)
        if length > _ENOUGH:
            break
    return "\n\n".join(found)


def windows(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Cut ``count`` windows of ``length`` tokens, evenly spread over ``ids`` without overlap.

    Raises ConfigError: the text is too short for that, or a window could not predict anything.
    """
    if length < 2 or count < 1:
        raise ConfigError(
            f"{count} windows of {length} tokens: at least one window of two tokens is needed: choose more"
        )
    if len(ids) < count * length:
        if count == 1:
            raise ConfigError(f"a window has {length:,} tokens; the text has {len(ids):,}: take a longer text")
        raise ConfigError(
            f"{count} windows of {length} tokens need {count * length:,} tokens; the text has {len(ids):,}: take a "
            "longer text, or fewer or shorter windows"
        )
    step = len(ids) // count
    return [list(ids[start : start + length]) for start in range(0, count * step, step)]


def windows_between(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Cut ``count`` windows from between those of :func:`windows`, in the middle of what follows each.

    Raises ConfigError where the text is too short for both.
    """
    whole = windows(ids, 2 * length, count)
    step = len(ids) // count
    return [list(ids[start + step // 2 : start + step // 2 + length]) for start in range(0, len(whole) * step, step)]

"""JSON files that were written by others: an object, no key twice, not too deep; errors name the file.

Python keeps the last of two equal keys, and other readers the first; it takes NaN, which is no JSON; and nested
brackets end in a RecursionError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from spinpass.errors import DamageError, first_line

_LONGEST = 1 << 29  # bytes; the largest tokenizers have some 50 MB


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises DamageError: it is no such file, has a key twice, holds NaN, is nested too deeply or larger than any.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise DamageError(f"{path} is larger than any JSON file of a model: it is not read")
        found = parsed(path.read_bytes(), str(path))
    except OSError as error:
        raise DamageError(f"{path} cannot be read ({error.strerror or error}): copy it again") from error
    if not isinstance(found, dict):
        raise DamageError(
            f"{path} is not what it should be: it holds a {type(found).__name__}, not an object of JSON; copy it again"
        )
    return found


def parsed(data: bytes, where: str) -> Any:
    """Return what the JSON holds. Raises DamageError, which names ``where``, as :func:`read_object`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DamageError(f"{where} has {twice[:80]!r} twice: which of them counts is not clear; copy it again")
        return found

    def number(text: str) -> float:
        if text == "NaN":
            raise DamageError(f"{where} holds NaN, which is no number; copy it again")
        return float(text)  # infinities, which some configurations hold

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=number)
    except RecursionError as error:
        _refuse(where, "is nested too deeply for JSON of a model", error)
    except ValueError as error:
        _refuse(where, f"cannot be read as JSON ({first_line(error)})", error)


def _refuse(where: str, why: str, error: BaseException) -> NoReturn:
    raise DamageError(f"{where} {why}: it is damaged, or not what its name says; copy it again") from error


def digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a document says, however it is laid out as JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

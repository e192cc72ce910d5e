"""What a value says as JSON, and how it is read again: every field is checked, and nothing else may stand there.

    value  ->  {"spinpass": KIND, "version": N, …}  ->  an equal value

Some fields are worked out from others, for whoever reads the document without spinpass. A reader makes the value from
the others and then compares all that it says with all that was read (:func:`check_told`), so that a document which was
changed in one place alone is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from spinpass.errors import ConfigError

_T = TypeVar("_T")
_ANEW = "take the document as it was written, or write it anew"
_LARGEST = sys.float_info.max
_SHOWN = 60  # characters of a value in a message


def titled(kind: str, version: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document: what kind of value it holds, how it is laid out, and its fields."""
    return {"spinpass": kind, "version": version, **fields}


class Fields:
    """The fields of an object of JSON, which are read one by one.

    Every method raises ConfigError where the field is missing or of another type; the message names its place.

    Args:
        data: what was read.
        place: what it is called in messages, for example ``plan.spaces[3]``.
    """

    def __init__(self, data: object, place: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{place} is a {_kind(data)}, not an object: {_ANEW}")
        self._data, self.place = data, place

    @classmethod
    def of(cls, data: object, kind: str, version: int) -> Fields:
        """Open a document of a kind. Raises ConfigError where it is of another kind or version, or no document."""
        if not isinstance(data, Mapping) or "spinpass" not in data:
            raise ConfigError(f"this is no {kind} of spinpass: it does not begin with 'spinpass': {kind!r}")
        if data["spinpass"] != kind:
            raise ConfigError(f"this is no {kind} of spinpass, but says that it is {_shown(data['spinpass'])}")
        found = data.get("version")
        if found != version or isinstance(found, bool):
            newer = isinstance(found, int) and not isinstance(found, bool) and found > version
            advice = "update spinpass" if newer else "write it anew"
            raise ConfigError(f"the {kind} is of version {_shown(found)}, and this one reads {version}: {advice}")
        return cls(data, kind)

    @property
    def all(self) -> Mapping[str, Any]:
        """The object as it was read."""
        return self._data

    def _read(self, name: str, what: str, fits: Callable[[Any], bool]) -> Any:
        if name not in self._data:
            raise ConfigError(f"{self.place} has no {name!r}: {_ANEW}")
        found = self._data[name]
        if not fits(found):
            raise ConfigError(f"{self.place}.{name} is {_shown(found)}, not {what}: {_ANEW}")
        return found

    def has(self, name: str) -> bool:
        """Say whether the field is there, and not null."""
        return self._data.get(name) is not None

    def text(self, name: str, allowed: Sequence[str] = ()) -> str:
        """Read a text, one of those allowed where there are any."""
        what = f"one of {', '.join(allowed)}" if allowed else "a text"
        return str(self._read(name, what, lambda x: isinstance(x, str) and (not allowed or x in allowed)))

    def flag(self, name: str) -> bool:
        """Read true or false."""
        return bool(self._read(name, "true or false", lambda x: isinstance(x, bool)))

    def count(self, name: str) -> int:
        """Read a whole number that is not negative."""
        return int(self._read(name, "a whole number from 0", _is_count))

    def integer(self, name: str) -> int:
        """Read a whole number."""
        return int(self._read(name, "a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool)))

    def number(self, name: str) -> float:
        """Read a number; one that is not finite stands there as a text."""
        return float(self._read(name, "a number", lambda x: _is_number(x) or x in ("inf", "-inf", "nan")))

    def perhaps(self, name: str, read: Callable[[str], _T]) -> _T | None:
        """Read a field by another method, or return None where it is null."""
        self._read(name, "there", lambda _: True)
        return read(name) if self.has(name) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """Read a list of texts."""
        return tuple(self._read(name, "a list of texts", _lists(lambda x: isinstance(x, str))))

    def counts(self, name: str) -> tuple[int, ...]:
        """Read a list of whole numbers that are not negative."""
        return tuple(self._read(name, "a list of whole numbers from 0", _lists(_is_count)))

    def inner(self, name: str) -> Fields:
        """Read an object inside."""
        return Fields(self._read(name, "an object", _is_object), f"{self.place}.{name}")

    def each(self, name: str) -> list[Fields]:
        """Read a list of objects."""
        found = self._read(name, "a list", _lists(lambda _: True))
        return [Fields(data, f"{self.place}.{name}[{k}]") for k, data in enumerate(found)]

    def plain(self, name: str) -> dict[str, Any]:
        """Read an object as it stands there."""
        return dict(self._read(name, "an object by texts", _is_object))


def check_told(kind: str, given: object, told: object) -> None:
    """Raise ConfigError where a document says something else than the value that was made of it, or more.

    Args:
        kind: what it holds.
        given: the document.
        told: what the value says of itself.
    """
    different = _difference(given, told, kind)
    if different is not None:
        place, found, expected = different
        raise ConfigError(f"{place} {found}, and the rest of the document {expected}: {_ANEW}")


def _difference(given: Any, told: Any, place: str) -> tuple[str, str, str] | None:
    """Return the first place at which two documents differ, what is there, and what is expected; None where none is."""
    if isinstance(given, Mapping) and isinstance(told, Mapping):
        for name in (*told, *(name for name in given if name not in told)):
            inside = f"{place}.{name}"
            if name not in given:
                return inside, "is missing", f"says {_shown(told[name])}"
            if name not in told:
                return inside, f"is {_shown(given[name])}", "has no such field"
            found = _difference(given[name], told[name], inside)
            if found is not None:
                return found
        return None
    if isinstance(given, list | tuple) and isinstance(told, list | tuple) and len(given) == len(told):
        pairs = (_difference(a, b, f"{place}[{k}]") for k, (a, b) in enumerate(zip(given, told)))
        return next((found for found in pairs if found is not None), None)
    if given == told and isinstance(given, bool) == isinstance(told, bool):
        return None
    return place, f"is {_shown(given)}", f"says {_shown(told)}"


def _lists(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list | tuple) and all(map(fits, x))


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= _LARGEST


def _is_object(x: Any) -> bool:
    return isinstance(x, Mapping) and all(isinstance(name, str) for name in x)


def _kind(x: object) -> str:
    return "list" if isinstance(x, list | tuple) else "null" if x is None else type(x).__name__


def _shown(x: object) -> str:
    text = repr(x)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

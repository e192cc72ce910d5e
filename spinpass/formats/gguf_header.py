"""What a GGUF file says of itself, checked against its length before anything is made of it; no tensor is read.

The format has no checksum. What there is: counts and lengths that the file can hold, types that exist, names that
differ, and tensors that follow each other, each of the size of its shape and type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from spinpass.errors import DamageError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES, _LONGEST_NAME, _LONGEST_ALIGNMENT = 8, 1 << 16, 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """The type of a tensor as a number, its sizes, the last of which are of what lies side by side, and its bytes."""

    kind: int
    shape: tuple[int, ...]
    first: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The keys with their values (of arrays their length), the tensors by name, whether numbers begin with their low
    byte."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)
    little_endian: bool = True


def check_gguf(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        path: of the file.
        sizes: of every type of tensor how many values a block has, and how many bytes.

    Raises DamageError: it is cut short, or says of itself what cannot be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(path, file, size).header(sizes)
    except OSError as error:
        raise DamageError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads what is there, and nothing that is only claimed."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size, self._order = path, file, size, "<"

    def header(self, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
        if self._take(4, "its first bytes") != b"GGUF":
            raise DamageError(f"{self._path} is no GGUF file: it does not begin as one; name another")
        version = self._number("I", "its version")
        if not version & 0xFFFF:
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise DamageError(f"{self._path} is of GGUF version {version}, and 2 and 3 are read; or it is damaged")
        tensors, keys = (self._count(what, 12) for what in ("number of tensors", "number of keys"))
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name("a key")
            if key in values:
                raise self._damaged(f"it has the key {key!r} twice")
            values[key] = self._value(self._number("I", key), key)
        return GgufHeader(values, self._tensors(tensors, sizes, self._alignment(values)), self._order == "<")

    def _alignment(self, values: Mapping[str, Any]) -> int:
        found = values.get("general.alignment", 32)
        if not isinstance(found, int) or not 0 < found <= _LONGEST_ALIGNMENT or found & (found - 1):
            raise self._damaged(f"it aligns its tensors to {found!r} bytes")
        return found

    def _tensors(self, count: int, sizes: Mapping[int, tuple[int, int]], alignment: int) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        at = end = 0
        for _ in range(count):
            name = self._name("the name of a tensor")
            axes = self._number("I", name)
            if axes > _MOST_AXES or name in found:
                raise self._damaged(f"the tensor {name!r} has {axes} axes, or stands there twice")
            shape = [self._number("Q", name) for _ in range(axes)]
            kind, offset = self._number("I", name), self._number("Q", name)
            if kind not in sizes:
                raise DamageError(
                    f"{self._path}: the tensor {name!r} is of type {kind}, which the package gguf does not know: the "
                    "file is damaged, or for a runtime of its own; name one with weights of another type"
                )
            if offset != at:
                raise self._damaged(f"the tensor {name!r} is at byte {offset}, where {at} is expected")
            block, length = sizes[kind]
            if not math.prod(shape) or shape[0] % block:
                raise self._damaged(f"the tensor {name!r} of shape {shape} does not consist of blocks of {block}")
            size = math.prod(shape) // block * length
            found[name] = GgufTensor(kind, tuple(reversed(shape)), at, size)
            end = at + size
            at = end + -end % alignment
        here = self._file.tell()
        start = here + -here % alignment
        if count and start + end > self._size:
            raise self._damaged(f"its tensors need {end:,} bytes, and it has {self._size - here:,} for them")
        return {name: replace(tensor, first=start + tensor.first) for name, tensor in found.items()}

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind == _STRING:
            return self._text(self._count(key, 1), key)
        if kind != _ARRAY:
            raise self._damaged(f"the key {key!r} has a value of type {kind}, which there is not")
        inner, count = self._number("I", key), self._count(key, 1)
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(f"={_SCALARS[inner]}"), key)
        elif inner == _STRING:
            for _ in range(count):
                self._text(self._count(key, 1), key)
        else:
            raise self._damaged(f"the key {key!r} has an array of type {inner}, which is not read")
        return count

    def _count(self, what: str, least: int) -> int:
        """Read a number of things of so many bytes at least, which the rest of the file can hold."""
        found = int(self._number("Q", what))
        if found * least > self._size - self._file.tell():
            raise self._damaged(f"{what} claims {found:,}, which do not fit into it")
        return found

    def _name(self, what: str) -> str:
        length = self._count(what, 1)
        if length > _LONGEST_NAME:
            raise self._damaged(f"{what} has {length:,} bytes")
        return self._text(length, what)

    def _text(self, length: int, what: str) -> str:
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is no text in UTF-8") from error

    def _number(self, kind: str, what: str) -> Any:
        layout = struct.Struct(self._order + kind)
        return layout.unpack(self._take(layout.size, what))[0]

    def _skip(self, length: int, what: str) -> None:
        if self._file.seek(length, 1) > self._size:
            raise self._damaged(f"it ends in the middle of {what}")

    def _take(self, length: int, what: str) -> bytes:
        found = self._file.read(length)
        if len(found) != length:
            raise self._damaged(f"it ends in the middle of {what}")
        return found

    def _damaged(self, why: str) -> DamageError:
        return DamageError(f"{self._path} is damaged: {why[:200]}; copy it again")

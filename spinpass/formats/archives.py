"""The zip files that torch writes (``.pt2``, ``.bin``, ``.pt``), every byte of them accounted for.

Nothing is compressed in them, so that no member is larger than the file. Members follow each other without gaps from
the first byte to the directory, and the directory to the end. What stands there twice has to agree: readers differ in
which of the two they believe.

| bytes | are |
|---|---|
| data | what the checksum says |
| names, sizes, checksums, flags, offsets | the same in front of the data, behind it, and in the directory |
| time, owner, padding | read by nobody |
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spinpass.errors import DamageError

_CHUNK = 1 << 22
_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_NARROW, _WIDE = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")  # what follows the data
_FLAGS = {0, 0x8, 0x800, 0x808}  # sizes behind the data, names in UTF-8
_VERSIONS = {0, 10, 20, 45}
_FOLDER = 0x10  # the one attribute that a reader looks at
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class _Member:
    """One entry of the directory."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int


def check_archive(path: Path) -> None:
    """Read a zip file of torch whole.

    Raises DamageError, which names the file and the member: a byte that counts is not what it was, two members have one
    name, a member is compressed, or bytes belong to nothing.
    """
    try:
        with path.open("rb") as file:
            _check(path, file)
    except (OSError, struct.error) as error:
        raise DamageError(f"{path} is damaged: {error}; copy it again") from error


def _check(path: Path, file: BinaryIO) -> None:
    start, stop, count = _ends(path, file)
    members = list(_directory(path, file, start, stop, count))
    twice = [name for name, times in Counter(member.name for member in members).items() if times > 1]
    if twice:
        raise DamageError(f"{path} holds {_shown(twice[0])} twice: it was not written by torch")
    at = 0
    for member in sorted(members, key=lambda m: m.offset):
        if member.offset != at:
            raise _damaged(path, member.name, f"it is said to begin at byte {member.offset}, not at {at}")
        at = _check_member(path, file, member)
        if at > start:
            raise _damaged(path, member.name, "it reaches into the directory")
    if at != start:
        raise DamageError(f"{path} is damaged: {start - at} bytes in front of its directory belong to nothing")


def _ends(path: Path, file: BinaryIO) -> tuple[int, int, int]:
    """Return where the directory begins and ends, and how many entries it has, by the records behind it."""
    size = file.seek(0, 2)
    if size < _END.size:
        raise DamageError(f"{path} is no archive of torch, or it is cut short; copy it again")
    end = size - _END.size
    magic, disk, first, here, count, length, start, comment = _read(file, end, _END)
    if magic != b"PK\x05\x06" or disk or first or here != count or comment:
        raise DamageError(f"{path} is damaged at its end, or cut short; copy it again")
    stop = end
    located = _read(file, end - _LOCATOR.size, _LOCATOR) if end >= _LOCATOR.size + _END64.size else None
    if located is not None and located[0] == b"PK\x06\x07":
        stop = end - _LOCATOR.size - _END64.size
        magic, rest, _, version, disk, first, here64, count64, length64, start64 = _read(file, stop, _END64)
        fine = located[1:] == (0, stop, 1) and magic == b"PK\x06\x06" and rest == _END64.size - 12
        fine &= version in _VERSIONS and not disk and not first and here64 == count64
        pairs = ((count, count64, _FULL16), (length, length64, _FULL32), (start, start64, _FULL32))
        if not fine or any(narrow not in (wide, full) for narrow, wide, full in pairs):
            raise DamageError(f"{path} is damaged at its end: its two records of the directory differ; copy it again")
        count, length, start = count64, length64, start64
    if start + length != stop:
        raise DamageError(f"{path} is damaged: its directory is not where its end says; copy it again")
    return start, stop, count


def _directory(path: Path, file: BinaryIO, start: int, stop: int, count: int) -> Iterator[_Member]:
    at = start
    for _ in range(count):
        if at + _CENTRAL.size > stop:
            break
        magic, _, version, flags, method, _, _, crc, packed, size, *more = _read(file, at, _CENTRAL)
        names, extras, comments, disk, _, attributes, offset = more
        name, extra = file.read(names), file.read(extras)
        at += _CENTRAL.size + names + extras + comments
        plain = not (comments or disk or attributes & _FOLDER)
        if magic != b"PK\x01\x02" or not plain or version not in _VERSIONS or flags not in _FLAGS:
            raise _damaged(path, name, "its entry in the directory is none of torch")
        size, packed, offset = _widened(path, name, extra, [size, packed, offset])
        if method or packed != size:
            raise DamageError(f"{path} holds {_shown(name)} compressed, which torch never does: it is not read")
        yield _Member(name, flags, crc, size, offset)
    if at != stop:
        raise DamageError(f"{path} is damaged: its directory has not the {count} entries that its end says")


def _widened(path: Path, name: bytes, extra: bytes, values: list[int]) -> list[int]:
    """Return the values, those that do not fit into 32 bits from the extra field that holds them."""
    wide = [i for i, value in enumerate(values) if value == _FULL32]
    if not extra and not wide:
        return values
    if len(extra) != 4 + 8 * len(wide) or struct.unpack("<2H", extra[:4]) != (1, 8 * len(wide)):
        raise _damaged(path, name, "its entry in the directory has a field that is none of torch")
    for i, value in zip(wide, struct.unpack(f"<{len(wide)}Q", extra[4:])):
        values[i] = value
    return values


def _check_member(path: Path, file: BinaryIO, member: _Member) -> int:
    """Compare a member's own header, data and what follows with the directory; return where it ends."""
    magic, version, flags, method, _, _, crc, packed, size, names, extras = _read(file, member.offset, _LOCAL)
    later = bool(member.flags & 0x8)
    stated = (crc, packed, size)
    known = {(member.crc, member.size, member.size), (member.crc, _FULL32, _FULL32)} | ({(0, 0, 0)} if later else set())
    if later:
        known.add((0, _FULL32, _FULL32))
    same = (magic, flags, method, file.read(names)) == (b"PK\x03\x04", member.flags, 0, member.name)
    if not same or stated not in known or version not in _VERSIONS:
        raise _damaged(path, member.name, "its header and the directory differ")
    at = file.seek(extras, 1)
    found, left = 0, member.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise _damaged(path, member.name, "the file ends in the middle of it")
        found, left = zlib.crc32(chunk, found), left - len(chunk)
    if found != member.crc:
        raise _damaged(path, member.name, "it is not what its checksum says")
    at += member.size
    if not later:
        return at
    for layout in (_NARROW, _WIDE):
        if _read(file, at, layout) == (b"PK\x07\x08", member.crc, member.size, member.size):
            return at + layout.size
    raise _damaged(path, member.name, "what follows it and the directory differ")


def _read(file: BinaryIO, at: int, layout: struct.Struct) -> tuple[Any, ...]:
    file.seek(at)
    return layout.unpack(file.read(layout.size))


def _shown(name: bytes) -> str:
    return ascii(name[:100].decode("utf-8", "replace"))[1:-1]


def _damaged(path: Path, name: bytes, why: str) -> DamageError:
    return DamageError(f"{path} is damaged: {_shown(name)}: {why}; copy it again")

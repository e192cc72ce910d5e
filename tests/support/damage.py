"""Files that are damaged on purpose: seeded flips of bytes, zip files with other members, code that must not run."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spinpass.errors import DamageError, SpinpassError, VerificationError


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def flips(data: bytes, count: int, *, start: int = 0, stop: int | None = None, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield places and the bytes with one bit or one byte there changed, spread over ``start`` to ``stop``."""
    draw = random.Random(seed)
    stop = len(data) if stop is None else stop
    places = range(start, stop) if count >= stop - start else sorted(draw.sample(range(start, stop), count))
    for place in places:
        changed = bytearray(data)
        changed[place] ^= draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        yield place, bytes(changed)


def unnoticed(
    path: Path, data: bytes, read: Callable[[Path], Any], count: int, *, stop: int | None = None
) -> Iterator[tuple[int, bytes, Any]]:
    """Yield the flips of a file that ``read`` takes: places, the bytes, and what is read. The others name the file."""
    for place, damaged in flips(data, count, stop=stop):
        path.write_bytes(damaged)
        try:
            found = read(path)
        except SpinpassError as error:
            assert isinstance(error, DamageError | VerificationError) and path.name in str(error)
            continue
        yield place, damaged, found


def members(data: bytes) -> dict[str, bytes]:
    """The members of a zip file by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(found: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these members."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, data in found.items():
            archive.writestr(name, data)
    return made.getvalue()


def saved(value: object, **options: Any) -> bytes:
    """What ``torch.save`` makes of a value."""
    made = io.BytesIO()
    torch.save(value, made, **options)
    return made.getvalue()


def copied(source: Path, target: Path) -> Path:
    """A folder's files in another folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target

"""Hashes of files that somebody else has written down, against the files.

| where | of | written by |
|---|---|---|
| the name of ``blobs/HASH``, which a file of the hub's cache is a link to | SHA-256, or git's of small files | hub |
| ``.cache/huggingface/download/NAME.metadata`` | the same | hub, in folders of its downloads |
| ``NAME.sha256``, ``SHA256SUMS`` | SHA-256 | people |
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from spinpass.errors import DamageError

from .manifest import sha256

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_SUMS = re.compile(r"([0-9a-fA-F]{64})(?:\s+[ *]?(.+))?")
_LONGEST = 1 << 20  # bytes of a list of sums


@dataclass(frozen=True)
class FileHash:
    """The size and SHA-256 of a file; ``note`` says that it was changed after it was downloaded."""

    bytes: int
    sha256: str
    note: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return it as ``spinpass.json`` holds it."""
        return {"bytes": self.bytes, "sha256": self.sha256}


def check_recorded(path: Path) -> FileHash:
    """Return the hash of a file, compared with every record of it that there is.

    Raises DamageError, which names the record: the file is not what was recorded.
    """
    found = sha256(path)
    blob = path.resolve()
    records = {f"the hub's cache ({blob.name[:12]}…)": blob.name} if blob.parent.name == "blobs" else {}
    for place in (path.with_name(f"{path.name}.sha256"), path.with_name("SHA256SUMS")):
        stated = _stated(place, path.name)
        if stated is not None:
            records[str(place)] = stated
    for where, stated in records.items():
        if not _agrees(path, found, stated):
            raise DamageError(f"{path} is damaged: it is not the file of {where}; copy it again")
    return FileHash(path.stat().st_size, found, _downloaded(path, found))


def _downloaded(path: Path, found: str) -> str | None:
    """Compare with the record of a download. A file that was written since is somebody's own, and a note says so."""
    place = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        _, stated, when, *_ = place.read_text(encoding="utf-8").split("\n") if place.is_file() else ("", "", "0")
        later = path.stat().st_mtime - 1 > float(when)
    except (OSError, ValueError):
        return f"the record of the download of {path.name} cannot be read: it was not compared"
    if _agrees(path, found, stated.strip()):
        return None
    if later:
        return f"{path.name} is not the file that was downloaded: it was written since"
    raise DamageError(f"{path} is damaged: it is not the file that was downloaded ({place}); copy it again")


def _agrees(path: Path, found: str, stated: str) -> bool:
    """Say whether a hash is the file's; what is no hash is taken for none."""
    if _SHA256.fullmatch(stated):
        return found == stated
    if _GIT.fullmatch(stated):
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == stated
    return True


def _stated(place: Path, name: str) -> str | None:
    """Return what a list of sums says of a file; a list of one sum needs no name."""
    if not place.is_file() or place.stat().st_size > _LONGEST:
        return None
    for line in place.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _SUMS.fullmatch(line.strip())
        if match is not None and (match[2] is None or match[2].removeprefix("./") == name):
            return match[1].lower()
    return None

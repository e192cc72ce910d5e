"""Writing exported artefacts: all files of one artefact appear together under their names, or none does."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spinpass.errors import ExportError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space or choose a folder on another disk",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "the folder is not writable for this user: choose another one or change its permissions",
    errno.EPERM: "the folder is not writable for this user: choose another one or change its permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "a folder of that name is in the way: choose another name",
    errno.ENOTEMPTY: "a folder of that name is in the way: choose another name",
    errno.EFBIG: "a file is larger than this file system or this user's limit allows: choose another folder",
}


@contextmanager
def staged(folder: Path, size: int = 0) -> Iterator[Path]:
    """Yield a new empty folder inside the destination; on leaving, its files move into ``folder`` by rename.

    ``folder`` is created if it is missing (and removed again if nothing gets there). If the body or a rename fails,
    files that were replaced are put back and the staging folder is deleted: ``folder`` is as it was before. ``size`` is
    what is going to be written, in bytes: a disk that cannot hold it is refused before anything is written.

    Raises:
        ExportError: the operating system refused to write; the message says why and what to do.
    """
    created = not folder.exists()
    staging: Path | None = None
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{size:,} bytes are needed and {free:,} are free")
        staging = Path(tempfile.mkdtemp(prefix=".spinpass-", dir=folder))
        yield staging
        _publish(staging, folder)
        done = True
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
        raise ExportError(
            f"cannot write to {folder}: {error.strerror or error} ({advice}); nothing was written"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if created and not done and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _publish(staging: Path, folder: Path) -> None:
    """Move every file of ``staging`` into ``folder``; put the old ones back if one of the renames fails."""
    new = sorted(path for path in staging.iterdir() if path.is_file())
    kept = staging / "replaced"
    kept.mkdir()
    moved: list[Path] = []
    try:
        for source in new:
            target = folder / source.name
            if target.is_file():
                os.replace(target, kept / source.name)
            os.replace(source, target)
            moved.append(target)
    except OSError:
        for target in moved:
            target.unlink()
        for old in kept.iterdir():
            os.replace(old, folder / old.name)
        raise

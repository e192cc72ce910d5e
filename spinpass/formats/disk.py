"""What the file system is asked for beside reading and writing: to keep what was written, to exchange two folders."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths are those of the process
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>


def sync_file(file: Path) -> None:
    """Wait until what was written to the file is on the disk. Raises OSError where the disk could not take it."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in the folder are on the disk, on systems that can be asked for it."""
    with suppress(OSError):  # a folder cannot be opened on Windows, nor synced on some network file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places, in one step that is seen whole or not at all.

    Raises OSError where the system or the file system has no such step, or one of them is a mount point.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))

"""A hidden folder that one run works in, under a lock that the kernel takes back when the run dies, however it dies.

So a folder whose lock can be had is what a dead run has left, and one whose lock cannot is a live run's.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_LOCK = "lock"


@dataclass(frozen=True)
class Workplace:
    """A folder that this run holds the lock of. It is ``alone`` there; where the file system has no locks, nobody
    knows."""

    path: Path
    alone: bool
    _lock: int

    def clear(self, keep: str = "") -> None:
        """Delete everything but the lock and what has this name."""
        for entry in os.scandir(self.path):
            if entry.name == keep:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != _LOCK:
                with suppress(OSError):
                    os.unlink(entry.path)

    def close(self, keep: str = "") -> None:
        """Delete the folder and give the lock back: in this order, so that whoever waits for it finds it gone.

        What has the name ``keep`` stays, and the folder with it.
        """
        try:
            if self.alone:
                self.clear(keep)
                with suppress(OSError):
                    os.unlink(self.path / _LOCK)
            with suppress(OSError):  # of others, where there are no locks; or what may not be deleted
                self.path.rmdir()
        finally:
            self.give_back()

    def give_back(self) -> None:
        """Give the lock back and leave the folder as it is."""
        os.close(self._lock)


def occupy(path: Path, *, wait: bool = False) -> Workplace:
    """Make the folder where it is missing, and take its lock; ``wait`` for a live run that has it.

    Raises:
        BlockingIOError: a live run has it.
        OSError: the folder cannot be made or written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        path.mkdir(exist_ok=True)
        try:
            lock = os.open(path / _LOCK, flags, 0o666)
        except FileNotFoundError:  # whoever had the folder has just deleted it
            continue
        try:
            alone = _locked(lock, wait=wait)
            if _is_still(path / _LOCK, lock):
                return Workplace(path, alone, lock)
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Wait until no other run is moving files in the folder, on systems where a folder can be locked."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _locked(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def is_workplace(folder: Path) -> bool:
    """Say whether a run works in this folder."""
    return folder.name.startswith(".") and ".spinpass" in folder.name and (folder / _LOCK).is_file()


def _locked(lock: int, *, wait: bool) -> bool:
    """Take the lock; return False where the file system has none. Raises BlockingIOError where another has it."""
    if sys.platform == "win32":
        try:
            msvcrt.locking(lock, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, "") from error
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: some network file systems
        return False
    return True


def _is_still(file: Path, lock: int) -> bool:
    """Say whether the file of that name is the one that was opened: another run may have deleted it in between."""
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(lock))
    except FileNotFoundError:
        return False

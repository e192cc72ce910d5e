"""Files that appear in a folder together under their names, or not at all, whatever stops the run that writes them.

    write to FOLDER/.spinpass-…/new  ->  sync  ->  commit mark  ->  old files to …/old, new ones to FOLDER  ->  delete …

A run that is killed before the mark has changed nothing. One that is killed behind it has done a part of the renames:
whoever opens the folder next, to write or to read, does the rest. Until then no model file is there, because it goes
first and comes last: no reader, whoever wrote it, sees the model of one export beside the data of another. A single
file needs no mark.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spinpass.errors import ExportError

from .disk import sync_file, sync_folder
from .workplace import Workplace, is_workplace, occupy, taking_turns

PREFIX = ".spinpass-"
"""What the hidden folders are called in which files wait for their names."""

_COMMIT, _NEW, _OLD = "commit", "new", "old"
_MODELS = (".onnx", ".xml", ".pte", ".safetensors", ".pt2")
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
def staged(folder: Path, size: int = 0, gone: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new empty folder inside the destination; on leaving, its files move into ``folder`` by rename.

    ``folder`` is created if it is missing (and removed again if nothing gets there). If the body or a rename fails,
    files that were replaced are put back and the staging folder is deleted: ``folder`` is as it was before. What killed
    runs have left is finished or deleted first.

    Args:
        folder: where the files go.
        size: what is going to be written, in bytes: a disk that cannot hold it is refused before anything is written.
        gone: names of files that are deleted as the new ones appear, as they are not among these.

    Raises:
        ExportError: the operating system refused to write; the message says why and what to do.
    """
    with refusals(folder), parents_of(folder):
        folder.mkdir(exist_ok=True)
        check_free(folder, size)
        _settle(folder)
        with _leaving(_new_workplace(folder)) as place:
            new = place / _NEW
            new.mkdir()
            yield new
            _publish(place, folder, gone)


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an ExportError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
        raise ExportError(
            f"cannot write to {folder}: {error.strerror or error} ({advice}); nothing was written"
        ) from error


def check_free(folder: Path, size: int, need: str = "") -> None:
    """Make sure that the disk of a folder, which need not be there yet, holds ``size`` bytes more.

    Raises ExportError otherwise, which begins with ``need`` where that says more than the number.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    with refusals(folder):
        if free < size:
            raise OSError(errno.ENOSPC, f"{need or f'{size:,} bytes are needed'} and {free:,} are free")


@contextmanager
def parents_of(folder: Path) -> Iterator[None]:
    """Make the folders above ``folder``. What is new, ``folder`` too, is removed again if nothing gets there."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in absent:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()


def finish(path: Path) -> None:
    """Do the rest of the renames of a run that was killed between them; a live run that is at them is waited for.

    ``path`` is a folder or a file in it, for whoever is going to read it. Nothing else in the folder is touched.

    Raises ExportError where they cannot be done.
    """
    folder = path if path.is_dir() else path.parent
    for left in _left_in(folder):
        if not os.path.lexists(left / _COMMIT):
            continue
        try:
            with _leaving(occupy(left, wait=True)) as place:
                _finish_one(place, folder)
        except OSError as error:
            raise ExportError(
                f"an export into {folder} was cut short while its files were moved there, and moving the rest fails "
                f"({error.strerror or error}): run this as a user who may write there, or export the folder again"
            ) from error


# -- what killed runs have left ---------------------------------------------------------------------------------------


def _settle(folder: Path) -> None:
    """Finish what killed runs had begun to move into the folder, and delete what else they have left in it."""
    for left in _left_in(folder):
        try:
            place = occupy(left)
        except BlockingIOError:  # a live run's
            continue
        with _leaving(place):
            _finish_one(left, folder)


def _left_in(folder: Path) -> list[Path]:
    """Return the staging folders in ``folder``; a link is none, since it may lead anywhere."""
    if not folder.is_dir():
        return []
    return [Path(e.path) for e in os.scandir(folder) if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]


def _new_workplace(folder: Path) -> Workplace:
    """Make a staging folder of a name that no other has."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            return replace(occupy(path), alone=True)
        except BlockingIOError:  # another run took it for a dead one's before its lock was there
            continue


@contextmanager
def _leaving(place: Workplace) -> Iterator[Path]:
    """Yield the folder; delete it on leaving, unless there are files in it still that are to be moved."""
    try:
        yield place.path
    finally:
        if os.path.lexists(place.path / _COMMIT):
            place.give_back()
        else:
            place.close()


# -- renames ----------------------------------------------------------------------------------------------------------


def _publish(place: Path, folder: Path, gone: Collection[str]) -> None:
    """Move every new file into ``folder``, and those that are ``gone`` out of it."""
    new = place / _NEW
    names = [path.name for path in new.iterdir() if path.is_file()]
    gone = [name for name in gone if name not in names and os.path.lexists(folder / name)]
    for name in (*names, *gone):
        if _is_folder(folder / name):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    if any(map(is_workplace, folder.absolute().parents)):  # a part of a larger export, which is synced as a whole
        for name in names:
            os.replace(new / name, folder / name)
        return
    for name in names:
        sync_file(new / name)
    if len(names) == 1 and not gone:
        os.replace(new / names[0], folder / names[0])
    elif names or gone:
        sync_folder(new)
        _commit(place, gone)
        with taking_turns(folder):
            try:
                _move(place, folder, gone)
            except OSError:
                _put_back(place, folder, names)
                os.unlink(place / _COMMIT)
                raise
            sync_folder(folder)
        os.unlink(place / _COMMIT)
    sync_folder(folder)


def _commit(place: Path, gone: Collection[str]) -> None:
    """Write the mark: from here on the new files are what the folder is to hold."""
    (place / _OLD).mkdir()
    draft = place / f"{_COMMIT}~"
    draft.write_text(json.dumps(sorted(gone)), encoding="utf-8")
    sync_file(draft)
    os.replace(draft, place / _COMMIT)
    sync_folder(place)
    sync_folder(place.parent)


def _move(place: Path, folder: Path, gone: Collection[str]) -> None:
    """Do the renames that have not been done yet: old files out, models first, then new ones in, models last."""
    new, old = place / _NEW, place / _OLD
    names = sorted((path.name for path in new.iterdir() if path.is_file()), key=_models_last)
    for name in sorted((*names, *gone), key=_models_last, reverse=True):
        if os.path.lexists(folder / name):
            os.replace(folder / name, old / name)
    for name in names:
        os.replace(new / name, folder / name)


def _put_back(place: Path, folder: Path, names: Collection[str]) -> None:
    """Undo what :func:`_move` has done with these new files: at every moment, they are all there or in the folder."""
    new, old = place / _NEW, place / _OLD
    for name in names:
        if not os.path.lexists(new / name):
            os.replace(folder / name, new / name)
    for path in list(old.iterdir()):
        os.replace(path, folder / path.name)


def _finish_one(place: Path, folder: Path) -> None:
    """Do the rest of a killed run's renames, if it had come to its mark.

    What lies there may have been made by anybody: names of other folders, and links to them, are not followed. Raises
    OSError where it is not what a run leaves.
    """
    mark = place / _COMMIT
    if not os.path.lexists(mark):
        return
    if mark.is_symlink() or not (_is_folder(place / _NEW) and _is_folder(place / _OLD)):
        raise OSError(errno.EINVAL, f"{place.name} in it is not what an export leaves")
    try:
        gone = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{mark} cannot be read") from error
    with taking_turns(folder):
        _move(place, folder, [name for name in gone if is_plain_name(name)])
        sync_folder(folder)
    mark.unlink()


def is_plain_name(name: object) -> bool:
    """Say whether this is the name of an entry of a folder, and no way out of the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _models_last(name: str) -> tuple[bool, str]:
    return name.endswith(_MODELS), name

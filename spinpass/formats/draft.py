"""A whole folder that appears at once: OUT holds the earlier export or the new one, whatever stops the run.

    .OUT.spinpass/run-…/new  (beside OUT, on its file system, under a lock)  ->  sync  ->  OUT, in one step

| OUT | how |
|---|---|
| absent | one rename |
| an earlier export, or empty | the two folders change places, and the old one is deleted |
| holds files of others; this process stands in it; a mount point; no such step here | file by file, :mod:`.staging` |

In the last case OUT itself stays what it was, and with it the files of others; a run that is killed between the renames
is finished by whoever opens OUT next. Where nothing may be written beside OUT, the workplace lies inside.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from spinpass.errors import ExportError, SpinpassError
from spinpass.workers import Team

from .disk import exchange, sync_file, sync_folder
from .manifest import listed_files
from .staging import PREFIX, parents_of, refusals, staged
from .workplace import Workplace, occupy

WORK = "work"
_SEEN_WITHIN = 60.0  # seconds until a folder that another node has made is to be seen
_STALE = (
    "model.onnx.data",
    "genai_config.json",
)  # of an export without a manifest: they would be read with the new model
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


class _Report(Protocol):
    """It says where files were written."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...


_R = TypeVar("_R", bound=_Report)


@dataclass(frozen=True)
class Draft:
    """A folder in the making: its files are written to ``folder`` and appear in ``out`` when it is whole."""

    out: Path
    folder: Path

    @property
    def work(self) -> Path:
        """The folder that outlives a run that does not end well, for what the next one can go on from."""
        return self.folder.parent.parent / WORK

    def in_place(self, report: _R) -> _R:
        """Return the report of a writer with the paths that its files have in the end."""
        here = report.path == self.folder
        files = tuple(self.out / file.name for file in report.files)
        return replace(report, path=self.out if here else self.out / report.path.name, files=files)  # type: ignore[type-var]


@contextmanager
def drafted(out: Path, team: Team | None = None) -> Iterator[Draft]:
    """Yield a draft of the folder ``out``, which no other run can write meanwhile; on leaving, it appears.

    Of a ``team`` rank 0 makes it, and the others have the same draft; it appears by rank 0 leaving.

    If the body fails nothing appears, and ``out`` is as it was. What killed runs have left of their own is finished or
    deleted first. An ``out`` that is a link stays one: the folder that it leads to is written.

    Raises:
        ExportError: another run is writing this folder; or the operating system refuses to write there, which is found
            before the body runs; or this rank does not see what rank 0 has made.
    """
    team = team or Team()
    if team.leads:
        with _own_draft(out) as draft:
            team.told(str(draft.folder))
            yield draft
        return
    folder = Path(team.told(None))
    deadline = time.monotonic() + _SEEN_WITHIN
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise ExportError(
                f"rank {team.rank} of {team.size} does not see {folder.parent.parent}, where rank 0 writes {out}: "
                "OUT has to lie in a folder that all nodes share, at one path"
            )
        time.sleep(0.1)
    yield Draft(out, folder)


@contextmanager
def _own_draft(out: Path) -> Iterator[Draft]:
    """Yield the draft of a process by itself, or of rank 0."""
    real = Path(os.path.realpath(out))
    with _reserved(out, real) as place:
        with refusals(out):
            if os.path.lexists(real):
                with staged(real):  # finishes and deletes what killed runs have left there; says whether it is writable
                    pass
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=place)) / "new"
            folder.mkdir()
        try:
            yield Draft(out, folder)
            with refusals(out):
                _appear(folder, real)
        except SpinpassError as error:
            error.args = (str(error).replace(str(folder), str(out)),)
            raise
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)


@contextmanager
def _reserved(out: Path, real: Path) -> Iterator[Path]:
    """Yield a workplace that no two runs have for one OUT: beside it, or inside where that cannot be."""
    with ExitStack() as stack:
        with refusals(out):
            stack.enter_context(parents_of(real))
            try:
                place = _occupied(real)
            except BlockingIOError as error:
                why = f"another run of spinpass is writing {out}: wait for it, or name another folder"
                raise ExportError(why) from error
            stack.push(lambda error, *_: place.close(keep="" if error is None else WORK))
        if place.alone:
            place.clear(keep=WORK)
        yield place.path


def _occupied(real: Path) -> Workplace:
    inside = real / f"{PREFIX}draft"
    if os.path.ismount(real):  # beside it is another disk
        return occupy(inside)
    try:
        return occupy(real.parent / f".{real.name}.spinpass")
    except OSError as error:
        if not real.is_dir() or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise
        return occupy(inside)


def _appear(folder: Path, out: Path) -> None:
    """Make ``folder`` what ``out`` is."""
    for file in folder.iterdir():
        sync_file(file)
    sync_folder(folder)
    if not os.path.lexists(out):
        os.rename(folder, out)
        sync_folder(out.parent)
        return
    own = listed_files(out)
    if not (_is_its_own(out, own) and _changed_places(folder, out, own)):
        _move_in(folder, out, own | set(_STALE) | _other_weights(folder, out))


def _other_weights(folder: Path, out: Path) -> set[str]:
    """Return the files of weights that transformers would read in place of a new checkpoint's, or beside them."""
    if not any(_WEIGHTS.fullmatch(name) for name in os.listdir(folder)):
        return set()
    return {name for name in os.listdir(out) if _WEIGHTS.fullmatch(name)} - set(os.listdir(folder))


def _is_its_own(out: Path, own: Collection[str]) -> bool:
    """Say whether nobody would miss this very folder: nothing of others is in it, and this process is not either."""
    here = Path.cwd()
    return here != out and out not in here.parents and all(name in own for name in os.listdir(out))


def _changed_places(folder: Path, out: Path, own: Collection[str]) -> bool:
    """Exchange the two folders, and say whether that could be done."""
    with suppress(OSError):
        os.chown(folder, out.stat().st_uid, out.stat().st_gid)
    with suppress(OSError):
        shutil.copystat(out, folder)
    try:
        exchange(folder, out)
    except OSError:
        return False
    for name in os.listdir(folder):
        if name not in own:  # others have put it there since it was looked for
            os.rename(folder / name, out / name)
    sync_folder(out.parent)
    sync_folder(folder.parent)
    return True


def _move_in(folder: Path, out: Path, own: Collection[str]) -> None:
    """Move the files of ``folder`` into ``out`` one by one, which whoever comes next can finish."""
    with staged(out, gone=own) as staging:
        for file in folder.iterdir():
            try:
                os.rename(file, staging / file.name)
            except OSError as error:
                if error.errno != errno.EXDEV:  # from one mount to another
                    raise
                shutil.copy2(file, staging / file.name)

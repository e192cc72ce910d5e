"""Runs of an export that are killed: at every call that changes the disk, or at any moment. It forks for every run.

    python -m tests.support.kills FOLDER MODE,... [REPEATS] [CALLS]

prints one JSON document: for each mode how many runs were killed, and a line for whatever went wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spinpass.formats import MANIFEST, drafted, hashes, read_artefact, sealed, staged
from spinpass.formats import draft as drafts

NAMES = {"model.pte", "weights.bin", "config.json", MANIFEST}
MODES = ("absent", "exchange", "force", "inside", "renames")
CALLS = {"renames": ("rename", "replace"), "all": ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")}


def export(out: Path, text: str, *, pause: float = 0.0) -> None:
    """What a folder export does, with files of a few bytes: each says which export it is of."""
    with drafted(out) as draft:
        for names in (("model.pte", "weights.bin"), ("config.json",)):
            with staged(draft.folder) as staging:
                for name in names:
                    (staging / name).write_text(f"{text} {name}")
                    time.sleep(pause)
        about = {"model": text, "files": hashes(draft.folder, NAMES - {MANIFEST})}
        with staged(draft.folder) as staging:
            (staging / MANIFEST).write_text(json.dumps(sealed(about)))


def found(out: Path) -> str:
    """Which export the folder holds, whole. Raises whatever is wrong with it."""
    artefact = read_artefact(out)
    artefact.check(files=True)
    text = str(artefact.manifest["model"])
    for name in NAMES - {MANIFEST}:
        assert (out / name).read_text() == f"{text} {name}", f"{name} is of another export than {text}"
    assert set(artefact.manifest["files"]) == NAMES - {MANIFEST}
    return text


def killed(action: Callable[[], None], moment: int | float, calls: str = "all") -> bool:
    """Run it in a process that dies at its ``moment``: a number among the calls, or seconds. False where it came to its
    end."""
    child = os.fork()
    if child == 0:
        if isinstance(moment, int):
            _die_at(moment, CALLS[calls])
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"it failed by itself: {status}"
    return status != 0


def _die_at(number: int, calls: tuple[str, ...]) -> None:
    """Die at this number of moments: in front of each call and behind it is one."""
    moments = 0

    def moment() -> None:
        nonlocal moments
        if moments == number:
            os.kill(os.getpid(), signal.SIGKILL)
        moments += 1

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            moment()
            result = real(*args, **options)
            moment()
            return result

        return call

    for name in calls:
        setattr(os, name, watched(getattr(os, name)))
    drafts.exchange = watched(drafts.exchange)


def prepared(folder: Path, mode: str) -> Path:
    """An OUT as the mode has it, with an older export of one more file in it, or none."""
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    folder.mkdir(parents=True)
    if mode != "absent":
        export(out, "old")
    if mode == "force":
        (out / "notes").mkdir()
        (out / "notes" / "a.txt").write_text("kept")
        (out / "mine.txt").write_text("kept")
    return out


def checked(out: Path, mode: str, number: object) -> list[str]:
    """What is wrong after a run was killed; then a next run has to leave its own files alone."""
    wrong = []
    try:
        if mode != "absent" or out.exists():
            raw = {p.name for p in out.iterdir() if not p.name.startswith(".spinpass-")}
            if mode in ("absent", "exchange") and raw != NAMES:  # before anything of spinpass looks at it
                wrong.append(f"{number}: it holds {sorted(raw)}")
            if found(out) not in ("old", "new"):
                wrong.append(f"{number}: it holds another export")
        export(out, "next")
        if found(out) != "next":
            wrong.append(f"{number}: the next run's files are not there")
        others = {"notes", "mine.txt"} if mode == "force" else set()
        strays = {p.name for p in out.iterdir()} ^ (NAMES | others) | {p.name for p in out.parent.iterdir()} - {"out"}
        if strays:
            wrong.append(f"{number}: strays or losses {sorted(strays)}")
        if others and {(out / "mine.txt").read_text(), (out / "notes" / "a.txt").read_text()} != {"kept"}:
            wrong.append(f"{number}: files of others have changed")
    except Exception as error:
        wrong.append(f"{number}: {type(error).__name__}: {error}")
    return wrong


def every_call(folder: Path, mode: str, calls: str) -> tuple[int, list[str]]:
    """Kill a run at each of its calls. Returns how many runs were killed, and what was wrong."""
    wrong: list[str] = []
    number = 0
    while True:
        out = prepared(folder, mode)
        with _as(mode, out):
            if not killed(partial(export, out, "new"), number, calls):
                return number, wrong
        wrong += checked(out, mode, number)
        number += 1


def random_moments(folder: Path, repeats: int) -> tuple[int, list[str]]:
    """Kill so many runs at random moments of their time."""
    wrong: list[str] = []
    chance, count = random.Random(0), 0
    out = prepared(folder, "exchange")
    began = time.perf_counter()
    killed(partial(export, out, "new", pause=0.01), -1)
    length = time.perf_counter() - began
    while count < repeats:
        out = prepared(folder, "exchange")
        count += killed(partial(export, out, "new", pause=0.01), chance.uniform(0.0, length))
        wrong += checked(out, "exchange", count)
    return count, wrong


def real_exports(folder: Path, repeats: int) -> tuple[int, list[str]]:
    """The same with ``spinpass export`` of a small program, which has an online rotation or none."""
    import torch

    from spinpass.config import RotationConfig
    from spinpass.folders import export as export_folder
    from spinpass.formats import save_program
    from tests.support import programs

    (folder / "in").mkdir(parents=True)
    model, out = folder / "in" / "model.pt2", folder / "work" / "out"
    save_program(programs.program("llama_tied", "hf", torch.float32), model)

    def write(config: RotationConfig | None) -> None:
        export_folder(model, out, config, certify=False)

    write(None)
    began = time.perf_counter()
    killed(lambda: write(RotationConfig()), -1)
    length, names = time.perf_counter() - began, {path.name for path in out.iterdir()}
    wrong: list[str] = []
    chance, count = random.Random(1), 0
    while count < repeats:
        write(None)
        count += killed(lambda: write(RotationConfig()), chance.uniform(0.0, length))
        whole = read_artefact(out)
        whole.check(files=True)
        if bool(whole.rotations) != bool(whole.manifest["plan"]) or {path.name for path in out.iterdir()} != names:
            wrong.append(f"{count}: a mixture")
        write(None)
        strays = {p.name for p in out.parent.iterdir()} - {"out"} | {p.name for p in out.iterdir()} ^ names
        if strays or read_artefact(out).rotations:
            wrong.append(f"{count}: strays {sorted(strays)}, or not the next export")
    return count, wrong


class _as:
    """The circumstances of a mode, for the process that is killed alone."""

    def __init__(self, mode: str, out: Path) -> None:
        self.mode, self.out, self.before, self.real = mode, out, Path.cwd(), drafts.exchange

    def __enter__(self) -> None:
        if self.mode == "inside":
            os.chdir(self.out)
        if self.mode == "renames":
            drafts.exchange = _refused

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)
        drafts.exchange = self.real


def _refused(one: Path, other: Path) -> None:
    raise OSError(38, "Function not implemented")


def main(folder: str, modes: str, repeats: str = "0", calls: str = "all") -> None:
    runs, document = {"random": random_moments, "real": real_exports}, {}
    os.fsync = lambda _: None  # a moment like others; a kill loses nothing that was written
    for mode in modes.split(","):
        work = Path(folder, mode)
        count, wrong = runs[mode](work, int(repeats)) if mode in runs else every_call(work, mode, calls)
        document[mode] = {"killed": count, "wrong": wrong}
    print(json.dumps(document))


if __name__ == "__main__":
    main(*sys.argv[1:])

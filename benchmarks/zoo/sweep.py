"""Measure the pass on every model type: ``python -m benchmarks.zoo.sweep [--only a,b] [--variant decode] [--jobs 2]``.

Records and programs are kept under ``out/zoo``; a second run measures what is missing or was measured with other
sources. Exit code 1 if the pass changed an output or raised something that is not its own, or a worker died.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

# Before torch is imported: workers share two cores, and nothing may ask a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import typer
from rich.progress import Progress

from spinpass.cli.screen import Screen

from . import records, states
from .export import register, warm_up
from .models import model_types
from .overrides import NOT_EXPORTABLE
from .records import Record
from .variants import VARIANTS
from .vision import image_text_types
from .worker import Job, buried, wall_limit, work

Report = Callable[[Record, int], None]  # a finished record, and how many are finished
_PAUSE = 0.05


def main(
    only: Annotated[str, typer.Option(help="Types, separated by commas; all if none are named.")] = "",
    variant: Annotated[str, typer.Option(help=f"One of {', '.join(VARIANTS)}.")] = "prefill",
    jobs: Annotated[int, typer.Option(help="Workers at a time.")] = 2,
    force: Annotated[bool, typer.Option(help="Export and measure again, whatever is kept.")] = False,
    remeasure: Annotated[bool, typer.Option(help="Measure again, on the programs that are kept.")] = False,
    out: Annotated[Path, typer.Option(help="Where records and programs are kept.")] = records.OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON document.")] = False,
) -> None:
    """Sweep the zoo."""
    if variant not in VARIANTS:
        raise typer.BadParameter(f"{variant!r} is not one of {', '.join(VARIANTS)}", param_hint="--variant")
    names = chosen(only, variant)
    planned = [Job(name, variant, out, force, remeasure) for name in names]
    now = records.sources(variant=variant)  # read once here, not by every worker
    todo = [job for job in planned if force or remeasure or not records.is_fresh(records.read(job.record), now)]
    screen = Screen(as_json=as_json)
    screen.note(f"{len(todo)} of {len(planned)} types to measure, {variant}")
    # Refreshed by hand: a thread that draws could hold a lock at the moment of a fork.
    with Progress(*Progress.get_default_columns(), console=screen.err, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(variant, total=len(todo))

        def report(record: Record, done: int) -> None:
            screen.note(f"[{done}/{len(todo)}] {line(record)}")
            progress.update(task, completed=done, refresh=True)

        run(todo, jobs, report)
    found = [record for job in planned if (record := records.read(job.record)) is not None]
    failures = [record for record in found if records.is_failure(record, NOT_EXPORTABLE)]
    if as_json:
        screen.document({"variant": variant, "ok": not failures, "records": found})
    for record in failures:
        screen.show(f"FAILED {line(record)}")
    screen.show(f"{len(found)} records, {len(failures)} failures")
    raise typer.Exit(1 if failures else 0)


def chosen(only: str, variant: str = "prefill") -> list[str]:
    """The named types, or all, in the order in which they are measured."""
    known = image_text_types() if variant == "vision" else model_types()
    names = [name.strip() for name in only.split(",") if name.strip()] or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise typer.BadParameter(f"transformers knows no type {', '.join(unknown)}", param_hint="--only")
    return names


def run(todo: list[Job], jobs: int, report: Report) -> None:
    """Work the jobs off in forked workers, ``jobs`` at a time."""
    if not todo:
        return
    torch.set_num_threads(1)
    register() if all(job.remeasure for job in todo) else warm_up()
    waiting, live = list(todo), dict[int, tuple[Job, float]]()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or live:
            while waiting and len(live) < jobs:
                job = waiting.pop(0)
                live[_fork(job)] = (job, time.monotonic())
            for record in _finished(live):
                report(record, len(todo) - len(waiting) - len(live))
            time.sleep(_PAUSE)
    finally:  # no worker outlives the sweep
        signal.signal(signal.SIGTERM, before)
        for pid in live:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def line(record: Record) -> str:
    """One record in a line."""
    default = record.get("runs", {}).get("default", {})
    error, seconds = default.get("error"), default.get("seconds")
    parts = [f"{record['type']:24}", record["status"]]
    parts += [f"{error:.1e} ({default['dtype']})"] if error is not None else []
    parts += [f"{seconds:.2f} s"] if seconds is not None else []
    why = record.get("why") or next((r["why"] for r in record.get("runs", {}).values() if r.get("why")), "")
    lines = why.strip().splitlines()
    return "  ".join(parts + ([lines[-1][:160]] if lines and record["status"] != states.SAME else []))


def _fork(job: Job) -> int:
    """A worker: torch and transformers are imported already, so that a type costs only its own work."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = job.record.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        work(job)
        code = 0
    finally:  # whatever happened: this process must not go on with the parent's work
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _finished(live: dict[int, tuple[Job, float]]) -> Iterator[Record]:
    """Take finished workers out of ``live``; one that hangs is ended."""
    for pid, (job, since) in list(live.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        hangs = not ended and time.monotonic() - since > wall_limit()
        if hangs:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if ended or hangs:
            del live[pid]
            yield buried(job, "hung" if hangs else _cause(status))


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "out of CPU time" if number == signal.SIGXCPU else f"signal {signal.Signals(number).name}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


if __name__ == "__main__":
    typer.run(main)

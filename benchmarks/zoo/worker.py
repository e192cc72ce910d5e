"""What one forked worker does for one type: get the program, measure it and keep the record, within limits."""

from __future__ import annotations

import os
import resource
import shutil
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from . import folder, records, states
from .export import NotExported, load, save
from .measure import measure
from .records import Record
from .variants import NotBuilt, Variant, export_variant

# CPU seconds, so that a busy machine changes nothing. The unrolled delta rules trace for minutes.
EXPORT_SECONDS, MEASURE_SECONDS = 400, 600
MEMORY = 10 << 30
_ASIDE = 4  # wall-clock seconds per CPU second before the parent gives up on a worker that hangs


@dataclass(frozen=True)
class Job:
    """One type in one variant. ``export``: make the program even where a usable one is kept; ``remeasure``: use the
    one that is kept even where it was made with older sources."""

    arch: str
    variant: Variant
    out: Path = records.OUT
    export: bool = False
    remeasure: bool = False

    @property
    def record(self) -> Path:
        return records.record_path(self.arch, self.variant, self.out)

    @property
    def folder(self) -> Path:
        """Where the model and the exported folder lie while they are looked at."""
        return self.out / "folders" / self.arch

    @property
    def program(self) -> Path:
        return records.program_path(self.arch, self.variant, self.out)


def wall_limit() -> int:
    """Seconds after which a worker is taken to hang."""
    return _ASIDE * (EXPORT_SECONDS + MEASURE_SECONDS)


def work(job: Job) -> None:
    """Run the job in this process, within its limits, and leave its record: first as running, then finished."""
    warnings.filterwarnings("ignore")
    limit_memory()
    record: Record = {"type": job.arch, "variant": job.variant, "sources": records.sources(variant=job.variant)}
    stage = _Stage(job, record)
    try:
        record |= _folder(job, stage) if job.variant == "folder" else _measured(job, stage, record)
    except (NotBuilt, folder.NotSaved) as error:
        record |= {"status": states.NOT_BUILT, "why": str(error)}
    except NotExported as error:
        record |= {"status": states.NOT_EXPORTED, "why": str(error)}
    except Exception as error:  # out of memory, a damaged file: the parent goes on with the next type
        died = {"status": states.DIED, "why": f"{stage.name}: {type(error).__name__}: {error}"[:500]}
        record |= {**died, "traceback": traceback.format_exc()[-3000:]}
    stage.leave()
    records.write(record, job.record)


def buried(job: Job, why: str) -> Record:
    """Finish the record of a worker that was ended from outside."""
    sources = records.sources(variant=job.variant)
    record = records.read(job.record) or {"type": job.arch, "variant": job.variant, "sources": sources}
    if record.get("status") in (None, states.RUNNING):
        record |= {"status": states.DIED, "why": f"{record.get('stage', 'start')}: {why}"}
        records.write(record, job.record)
    return record


def _measured(job: Job, stage: _Stage, record: Record) -> Record:
    stage.enter("export", EXPORT_SECONDS)
    program = _program(job, record)
    stage.enter("measure", MEASURE_SECONDS)
    return measure(program)


def _folder(job: Job, stage: _Stage) -> Record:
    """Every step has the limit of a whole export."""
    shutil.rmtree(job.folder, ignore_errors=True)  # of a worker that was ended
    job.folder.mkdir(parents=True)
    stage.enter("save", EXPORT_SECONDS)
    try:
        return folder.measure(job.arch, job.folder, lambda step: stage.enter(step, EXPORT_SECONDS))
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)


def _program(job: Job, record: Record) -> ExportedProgram:
    """The kept program of the job if it is usable, else a new one, which is kept."""
    kept = records.read(job.program.with_suffix(".json"))
    usable = kept is not None and (job.remeasure or kept.get("building") == records.building_version())
    if kept is not None and usable and not job.export and job.program.is_file():
        record["export"] = kept
        program = load(job.program)
    else:
        program = _new_program(job, record)
    return program.run_decompositions() if job.variant == "decomposed" else program


def _new_program(job: Job, record: Record) -> ExportedProgram:
    made = export_variant(job.arch, "prefill" if job.variant == "decomposed" else job.variant)
    about = {
        "building": records.building_version(),
        "way": made.way,
        "seconds": round(made.seconds, 2),
        "failures": list(made.failures),
    }
    record["export"] = about
    save(made.program, job.program)
    records.write(about, job.program.with_suffix(".json"))
    return made.program


class _Stage:
    """The part of the work under way, with its limit of CPU time; written down, so that the parent knows where a
    worker ended."""

    def __init__(self, job: Job, record: Record) -> None:
        self.job, self.record, self.name, self._began = job, record, "", 0.0

    def enter(self, name: str, seconds: int) -> None:
        self.leave()
        self.name, self._began = name, time.perf_counter()
        limit_time(seconds)
        records.write({**self.record, "status": states.RUNNING, "stage": name, "pid": os.getpid()}, self.job.record)

    def leave(self) -> None:
        if self.name:
            times: dict[str, Any] = self.record.setdefault("stages", {})
            times[self.name] = round(time.perf_counter() - self._began, 2)


def limit_time(seconds: int) -> None:
    """End this process by a signal when it has used ``seconds`` more of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, resource.RLIM_INFINITY))


def limit_memory() -> None:
    """Let an allocation fail before the machine runs out."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))

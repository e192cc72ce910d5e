"""How a run may end without a folder: the memory was not enough, the disk was full, the model's files were changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from spinpass.errors import SpinpassError, WorkerError
from spinpass.formats import Draft
from spinpass.graph import HOST
from spinpass.loading import SourceFiles
from spinpass.progress import Steps
from spinpass.workers import Team

from .request import ExportRequest

_NO_MEMORY = (  # of torch, the system and ONNX Runtime
    "DefaultCPUAllocator: can't allocate", "Cannot allocate memory", "CUDA out of memory",
    "Failed to allocate memory for requested buffer", "bad_alloc",
)  # fmt: skip


@contextmanager
def still_the_same(files: SourceFiles, steps: Steps) -> Iterator[None]:
    """Make sure that a model's weights are, when what was made of them is there, what they were when it was loaded.

    What a run fails with whose weights were changed underneath it is nobody's fault: that is said in its place. Raises
    ExportError as :meth:`spinpass.loading.SourceFiles.check_unchanged`.
    """
    try:
        yield
    except SpinpassError as error:
        if not of_the_machine(error):
            files.check_unchanged()
        raise
    files.check_unchanged(steps.start("check the weights again", "bytes"))


@contextmanager
def kept_for_another_try(draft: Draft, team: Team | None = None) -> Iterator[None]:
    """Keep what a run has rounded where it may end otherwise the next time, as when the disk was full; elsewhere the
    same command would end in the same way, and what is kept would stand in the way of another."""
    try:
        yield
    except SpinpassError as error:
        if (team is None or team.leads) and not of_the_machine(error):
            shutil.rmtree(draft.work, ignore_errors=True)
        raise


def out_of_memory(error: BaseException | None) -> bool:
    """Whether there was no memory for something, by what Python and torch raise."""
    while error is not None:
        if isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


def of_the_machine(error: BaseException | None) -> bool:
    """Whether an error is of a disk, a memory or another process, which may be another the next time."""
    while error is not None:
        if isinstance(error, (OSError, WorkerError)) or out_of_memory(error):
            return True
        error = error.__cause__
    return False


def whose_memory(request: ExportRequest) -> str:
    """Say whose memory may not have been enough for a request."""
    return "this machine's memory" if request.device == HOST else f"the memory of this machine or of {request.device}"


def cheaper(request: ExportRequest) -> str:
    """What takes less memory than a request."""
    if request.device != HOST:
        return f"leave out --device {request.device}, or read a shorter text (--samples 4)"
    scheme = request.scheme
    if scheme is not None and scheme.learn is not None:
        return "learn nothing (--recipe quick), or read a shorter text (--samples 8)"
    if scheme is not None and scheme.needs_calibration:
        return "read a shorter text (--samples 4), or round to nearest (--recipe plain)"
    if request.dtype == "float32":
        return "keep the dtype of the files (--dtype auto), or close what else runs"
    return "close what else runs, or take a machine with more"

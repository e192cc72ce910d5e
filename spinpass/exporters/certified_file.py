"""A program written to files that are compared with it before they appear under their names.

    stage  ->  write  ->  compare  ->  publish  ->  report

Whatever fails on the way, nothing is left behind and older files of that name stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch.export import ExportedProgram

from spinpass.certificate import FileCertificate
from spinpass.formats import staged
from spinpass.graph import Handle, storage_key

from .names import GraphNames

CERTIFY_BYTES = 2**31
"""Above this many bytes of weights in memory ``verify=None`` does not certify: both the program and the runtime would
be run. Constants that are read when they are used do not count."""


def resident_bytes(ep: ExportedProgram) -> int:
    """Return how many bytes of a program's constants stand in memory while it is run."""
    held = {storage_key(tensor): tensor for tensor in ep.state_dict.values()}
    return sum(tensor.nbytes for tensor in held.values() if not isinstance(tensor, Handle))


SWITCHED_OFF = "switched off"
"""Why a file has no certificate where the caller wanted none."""


class Clock:
    """A clock measures the wall-clock ``seconds`` of steps, and calls ``progress`` with the name of each before it
    starts."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._step = ""
        self._began = 0.0

    def start(self, step: str) -> None:
        """End the step under way and begin this one."""
        self.stop()
        if self._progress is not None:
            self._progress(step)
        self._step, self._began = step, time.perf_counter()

    def stop(self) -> None:
        """End the step under way."""
        if self._step:
            self.seconds[self._step] = time.perf_counter() - self._began


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """This is what an exporter wrote: ``path`` is the model's file, ``bytes`` the size of all ``files`` together.

    ``inputs`` and ``outputs`` are the names of what goes into the graph and comes out. Where there is no
    ``certificate``, ``uncertified`` says why. ``seconds`` maps the steps to wall-clock time.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    certificate: FileCertificate | None
    uncertified: str
    seconds: Mapping[str, float]

    KEYS: ClassVar[tuple[str, ...]] = (
        "path", "files", "bytes", "inputs", "outputs", "certificate", "uncertified", "seconds",
    )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that ``KEYS`` lists, as JSON can hold them."""
        return {key: _plain(getattr(self, key)) for key in self.KEYS}


def write_certified(
    target: Path,
    names: GraphNames,
    clock: Clock,
    save: Callable[[Path], object],
    compare: Callable[[Path], FileCertificate | str] | None,
    *,
    weights: int = 0,
    resident: int | None = None,
    verify: bool | None = None,
) -> FileReport:
    """Write the file ``target``, and whatever lies beside it, and compare it with the program.

    Args:
        target: the model's file; its folder is made where it is missing.
        names: what the graph's inputs and outputs are called; the report lists them.
        clock: it is stopped when the files are there.
        save: it writes to the path that it is given, and names its own steps.
        compare: it returns the certificate of the file at the path that it is given, or why there can be none. Where it
            is None nothing is compared, and there is no such step.
        weights: how many bytes the disk has to hold.
        resident: how many bytes of weights the comparison holds in memory, ``weights`` for None; ``verify=None`` goes
            by them.
        verify: False does not compare, None compares up to :data:`CERTIFY_BYTES`, True always.

    Raises:
        ExportError: nothing can be written there.
        VerificationError: the file would not compute what the program computes.
    """
    with staged(target.parent, weights) as staging:
        save(staging / target.name)
        written = sorted(staging.iterdir())
        size = sum(file.stat().st_size for file in written)
        found: FileCertificate | str = SWITCHED_OFF
        if compare is not None:
            clock.start("certify")
            found = _unwanted(verify, weights if resident is None else resident) or compare(staging / target.name)
        if isinstance(found, FileCertificate):
            found.raise_if_failed()
    clock.stop()
    return FileReport(
        path=target,
        files=tuple(target.parent / file.name for file in written),
        bytes=size,
        inputs=tuple(names.inputs),
        outputs=tuple(names.outputs),
        certificate=found if isinstance(found, FileCertificate) else None,
        uncertified=found if isinstance(found, str) else "",
        seconds=clock.seconds,
    )


def _unwanted(verify: bool | None, weights: int) -> str:
    """Return why the file is not to be compared; the reason is empty where it is."""
    if verify is False:
        return SWITCHED_OFF
    if verify is None and weights > CERTIFY_BYTES:
        return f"{weights:,} bytes of weights are above the limit of {CERTIFY_BYTES:,}: pass verify=True"
    return ""


def _plain(value: Any) -> Any:
    """Return the value as JSON has it."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value

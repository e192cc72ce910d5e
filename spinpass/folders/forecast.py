"""What an export will take, before anything is read: memory, disk and time, by step.

    shapes in the headers of the files, what is asked for, rates of the machine  ->  Forecast

Memory is the process's own beyond its imports, at the largest of the steps; ``python -m benchmarks.memory`` compares it
with runs. For targets other than ONNX, and where no header has shapes, it is a bound from below: the program and what
it becomes. What the runtime takes that tries a rounded file is in it, also where that is a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .costs import RUN, memory_of, seconds_of, steps_of
from .machine import Rates
from .workload import Workload

MARGIN = 0.3
"""By how much of itself a forecast of memory may be off: shapes that were measured are within it."""

REFERENCE = Rates(38e9, 95e9, 20e9, 47e9, 1e9, 1.8e9, 0.13e9, 350e3)
"""Rates of the machine that times were fitted on, one thread: where none are measured, steps are weighed by them."""


@dataclass(frozen=True)
class StepForecast:
    """A step, its wall-clock ``seconds``, and the most ``bytes`` of memory that the process has in it."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Args:
        steps: in their order.
        read_bytes: of the model's files, as often as they are read; their pages are read from the disk once where they
            fit into what is free.
        written_bytes: of the folder.
        disk_bytes: that have to be free beside OUT while the run lasts, those of the folder among them.
        exact: whether memory is foreseen within :data:`MARGIN`; where not, it is a bound from below.
    """

    steps: tuple[StepForecast, ...]
    read_bytes: int
    written_bytes: int
    disk_bytes: int
    exact: bool

    @classmethod
    def of(cls, work: Workload, rates: Rates = REFERENCE) -> Forecast:
        """Foresee a run.

        Args:
            work: what there is to do, as :meth:`.preflight.Known.workload` counts it.
            rates: of the machine, as :meth:`Rates.measured` has them.
        """
        steps = tuple(
            StepForecast(name, seconds_of(name, work, rates), memory_of(name, work)) for name in steps_of(work)
        )
        return cls(
            steps=steps,
            read_bytes=work.stored * work.reads,
            written_bytes=work.written,
            disk_bytes=work.written + work.intermediate,
            exact=work.known and work.target == "onnx" and not work.trains and not work.elsewhere,
        )

    @property
    def memory_bytes(self) -> int:
        """The most memory that the process has beyond its imports, until the file is written and certified."""
        return max(step.bytes for step in self.steps if step.name not in RUN)

    @property
    def runtime_bytes(self) -> int:
        """The most that it has, and the runtime with it, when the written file is run; where there is less, it is not
        run."""
        return max((step.bytes for step in self.steps if step.name in RUN), default=0)

    @property
    def seconds(self) -> float:
        """The wall-clock time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def least_bytes(self) -> int:
        """The memory below which the run cannot be: the forecast less its margin, which bounds from below have as well,
        as they are made of the same fitted numbers."""
        return int(self.memory_bytes * (1 - MARGIN))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "runtime_bytes": self.runtime_bytes,
            "memory_margin": MARGIN if self.exact else None,
            "seconds": self.seconds,
            "steps": [vars(step) for step in self.steps],
        }


def fitting(work: Workload, memory: int) -> str:
    """Return the first setting that lets a run fit into so much memory, of those that change least; empty where none
    does."""
    for setting, other in work.smaller():
        if Forecast.of(other).least_bytes <= memory:
            return setting
    return ""

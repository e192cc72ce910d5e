"""The steps of a command as they are shown: a bar in a terminal, lines in a log, events where the result is JSON.

    {"event": "step", "name": "quantize", "step": 7, "of": 12, "seconds": 31.5, "left": 120}
    {"event": "progress", "name": "quantize", "done": 12, "total": 61, "unit": "", "seconds": 44.0, "left": 96}
    {"event": "done", "seconds": {"load": 1.2, …}}

``seconds`` are those of the command, ``left`` is an estimate; ``step``, ``of`` and ``left`` are null where nothing was
foreseen. A bar, a line and an event are never more than some seconds apart, however long a step is silent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display

from spinpass.progress import Course, Progress, Silent

from .plain import plain

QUICK = 2.0
"""Seconds until a log says anything."""
SELDOM = 10.0
"""Seconds between the lines of a log within a step."""
OFTEN = 1.0
"""Seconds between events within a step."""
_LOOKED = 0.5  # seconds between looks at whether a line is due
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class ToldSteps(Silent):
    """The steps of a command, one after the other, with their wall-clock ``seconds``, told at least so often.

    Args:
        often: seconds between two reports within a step.
    """

    def __init__(self, often: float) -> None:
        super().__init__()
        self._often = often
        self._course = Course()
        self._counted: tuple[int, int, str] | None = None
        self._began_at = self._step_at = self._said = time.monotonic()
        self._over = threading.Event()
        self._turn = threading.RLock()
        threading.Thread(target=self._watch, daemon=True).start()

    def expect(self, steps: Sequence[tuple[str, float]], /) -> None:
        """See :meth:`spinpass.progress.Steps.expect`."""
        self._course = Course(steps)

    def start(self, name: str, /, unit: str = "") -> Progress:
        """See :meth:`spinpass.progress.Steps.start`."""
        with self._turn:
            now = time.monotonic()
            super().start(name, unit)
            self._course.enter(name, now - self._step_at)
            self._step_at, self._counted = now, None
            self._begun(name)

        def progress(done: int, total: int) -> None:
            with self._turn:
                if self._name == name:
                    self._counted = (done, total, unit)
                    self._counting(done, total)
                    self._if_due()

        return progress

    def close(self) -> None:
        """End the step under way, and say nothing more."""
        self._over.set()
        self.finish()

    @property
    def passed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self._began_at

    @property
    def left(self) -> float | None:
        """Seconds that may be left; None where nothing was foreseen."""
        share = None
        if self._counted is not None and self._counted[1]:
            share = self._counted[0] / self._counted[1]
        return self._course.left(time.monotonic() - self._step_at, share)

    def _watch(self) -> None:
        while not self._over.wait(_LOOKED):
            with self._turn:
                if self._name:
                    self._if_due()

    def _if_due(self) -> None:
        if time.monotonic() - self._said > self._often and not self._over.is_set():
            self._said = time.monotonic()
            self._still(self._name)

    def _begun(self, name: str) -> None:
        """Show that a step begins."""

    def _counting(self, done: int, total: int) -> None:
        """Show how far it is, where that can be shown at any time."""

    def _still(self, name: str) -> None:
        """Say how far it is."""


class ShownSteps(ToldSteps):
    """Steps for people.

    A terminal shows a bar. In a log each step is a line as it begins, and long ones say every few seconds how far they
    are; a command that is done in two seconds writes nothing.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._task = display.add_task("", total=None, left="")
        super().__init__(OFTEN if display.console.is_terminal else SELDOM)

    @staticmethod
    def columns() -> tuple[Any, ...]:
        """Return what a terminal shows beside each other."""
        described = TextColumn("{task.description}")
        return (
            SpinnerColumn(),
            described,
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )

    def _begun(self, name: str) -> None:
        self._display.reset(self._task, description=escape(self._line(name)), total=None, left=self._left())
        if not self._display.console.is_terminal and self.passed > QUICK:
            self._log(self._line(name))

    def _counting(self, done: int, total: int) -> None:
        self._display.update(self._task, completed=done, total=total)

    def _still(self, name: str) -> None:
        if self._display.console.is_terminal:
            counted = self._amount()
            described = f"{self._line(name)}  {counted}" if counted else self._line(name)
            self._display.update(self._task, description=escape(described), left=self._left())
            return
        parts = self._amount(), self._left()
        about = ", ".join(filter(None, parts)) or "under way"
        self._log(f"{self._line(name)}: {about}")

    def _line(self, name: str) -> str:
        place = self._course.place
        return plain(name) if place is None else f"step {place[0]} of {place[1]}: {plain(name)}"

    def _amount(self) -> str:
        """How much of a step is done."""
        if self._counted is None:
            return ""
        done, total, unit = self._counted
        if unit != "bytes":
            return f"{done} of {total} {unit}".rstrip()
        return f"{in_bytes(done)} of {in_bytes(total)}"

    def _left(self) -> str:
        left = self.left
        return "" if left is None else f"about {in_time(left)} left"

    def _log(self, line: str) -> None:
        self._said = time.monotonic()
        self._display.console.print(f"{self.passed:6.0f} s  {line}", style="dim", highlight=False)


class EventSteps(ToldSteps):
    """Steps for programs: each is an event as it begins, and every second how far it is.

    Args:
        emit: writes one event.
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        super().__init__(OFTEN)

    def _begun(self, name: str) -> None:
        self._said = time.monotonic()
        step, of = self._course.place or (None, None)
        self._emit({"event": "step", "name": name, "step": step, "of": of} | self._times())

    def _still(self, name: str) -> None:
        done, total, unit = self._counted or (None, None, "")
        self._emit({"event": "progress", "name": name, "done": done, "total": total, "unit": unit} | self._times())

    def _times(self) -> dict[str, Any]:
        left = self.left
        return {"seconds": round(self.passed, 1), "left": None if left is None else round(left)}


def in_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    for size, name in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:.0f} bytes"


def in_time(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

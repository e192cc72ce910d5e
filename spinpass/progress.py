"""What long work calls to say how far it is: whoever shows it, a terminal or a log, hands it in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

Progress = Callable[[int, int], None]
"""A function that is called with (done, total)."""

Tick = Callable[[], None]
"""A function that is called once for every piece that is done."""


class Steps(Protocol):
    """The steps of one piece of work, told as they begin."""

    seconds: dict[str, float]
    """The wall-clock time of the steps that are done, in seconds, by name."""

    def expect(self, steps: Sequence[tuple[str, float]], /) -> None:
        """Take down which steps will come, in order, and how long each may take, in seconds or any other unit."""

    def start(self, name: str, /, unit: str = "") -> Progress:
        """End the step before and begin this one; call the result with (done, total) where that is known, which count
        pieces of the ``unit``, for example ``"bytes"``."""

    def begin(self, name: str, /) -> None:
        """Do as :meth:`start` for a step that cannot say how far it is."""

    def finish(self) -> None:
        """End the step under way."""


class Silent:
    """:class:`Steps` that are timed and not shown."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._began = "", 0.0

    def expect(self, steps: Sequence[tuple[str, float]], /) -> None:
        """Show nothing, and so need no forecast."""

    def start(self, name: str, /, unit: str = "") -> Progress:
        """End the step before and begin this one, as :meth:`Steps.start` says; what is returned does nothing."""
        self.finish()
        self._name, self._began = name, time.perf_counter()
        return lambda done, total: None

    def begin(self, name: str, /) -> None:
        """End the step before and begin this one, as :meth:`Steps.begin` says."""
        self.start(name)

    def finish(self) -> None:
        """End the step under way."""
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._began
            self._name = ""


class Course:
    """How far a run is of the steps that were expected of it, and how long what is left may take.

    Steps that come unexpected are counted as they come, and those that do not come as done. A step that says what it is
    done in ("try in …") may be expected without that.
    """

    def __init__(self, steps: Sequence[tuple[str, float]] = ()) -> None:
        self._steps = list(steps)
        self._forecast = bool(steps)
        self._at = -1
        self._spent = 0.0  # seconds, by the steps that are done
        self._foreseen = 0.0  # units, for them

    def enter(self, name: str, spent: float) -> None:
        """Take down that a step begins, and how many seconds the one before it took."""
        if self._at >= 0:
            self._spent += spent
            self._foreseen += self._steps[self._at][1]
        behind = range(self._at + 1, len(self._steps))
        found = next((k for k in behind if self._steps[k][0] in (name, name.partition(" in ")[0])), None)
        if found is None:
            self._steps.insert(self._at + 1, (name, 0.0))
            found = self._at + 1
        self._at = found

    @property
    def place(self) -> tuple[int, int] | None:
        """Which step this is, from 1, and of how many; None where nothing was expected."""
        return (self._at + 1, len(self._steps)) if self._forecast else None

    def left(self, spent: float, share: float | None) -> float | None:
        """Return how many seconds may be left, by what the steps so far have taken of what was foreseen for them.

        Args:
            spent: seconds since this step began.
            share: how much of it is done, where that is known.

        Returns:
            None where nothing was expected.
        """
        if not self._forecast:
            return None
        here, later = self._steps[self._at][1], sum(seconds for _, seconds in self._steps[self._at + 1 :])
        pace = (self._spent + _DOUBT) / (self._foreseen + _DOUBT)
        if share:
            rest = spent * (1 - share) / share
            if share > _TELLING:  # then this step tells, too, how fast the machine is
                pace = (self._spent + spent + rest + _DOUBT) / (self._foreseen + here + _DOUBT)
        else:
            rest = max(0.0, here * pace - spent)
        return rest + later * pace


_DOUBT = 5.0  # seconds of the forecast that are believed whatever the first steps take
_TELLING = 0.2  # of a step, before which its share says little

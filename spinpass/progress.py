"""What long work calls to say how far it is: whoever shows it, a terminal or a log, hands it in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

Progress = Callable[[int, int], None]
"""A function that is called with (done, total)."""

Tick = Callable[[], None]
"""A function that is called once for every piece that is done."""


class Steps(Protocol):
    """The steps of one piece of work, told as they begin."""

    seconds: dict[str, float]
    """The wall-clock time of the steps that are done, in seconds, by name."""

    def start(self, name: str, /) -> Progress:
        """End the step before and begin this one; call the result with (done, total) where that is known."""

    def begin(self, name: str, /) -> None:
        """Do as :meth:`start` for a step that cannot say how far it is."""

    def finish(self) -> None:
        """End the step under way."""


class Silent:
    """:class:`Steps` that are timed and not shown."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._began = "", 0.0

    def start(self, name: str, /) -> Progress:
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

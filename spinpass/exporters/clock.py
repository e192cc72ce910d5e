"""Wall-clock seconds of the steps of an export."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """``start(step)`` ends the step before; ``seconds`` has what each took. ``progress`` is told of each before it
    starts."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._step = ""
        self._began = 0.0

    def start(self, step: str) -> None:
        self.stop()
        if self._progress is not None:
            self._progress(step)
        self._step, self._began = step, time.perf_counter()

    def stop(self) -> None:
        if self._step:
            self.seconds[self._step] = time.perf_counter() - self._began

"""taught:  a lesson and the parts that learn  ->  parts that have moved, where that helps on windows held out.

    min over moves  KL( softmax f(x) ‖ softmax f̂(x; moves) )

The original program f is the teacher; the student f̂ is any program with its graph as it is, whose constants the parts
compute. The loop knows nothing of what they are.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spinpass.errors import ConfigError, LearningError
from spinpass.progress import Progress, Tick
from spinpass.workers import Team

from .checkpoint import BEST, Checkpoint, make_folder
from .descent import Descent
from .lesson import Lesson
from .local import Blocks
from .moves import LearningPart, all_moves, kinds_of, of_kind, set_moves, values, without
from .record import LearningRecord
from .settings import Learning

_CHECKS = 6  # of the held-out windows on the way
_PATIENCE = 3  # of them in a row that are worse than the best end it
_TIMED = 3  # steps tell how long one takes


def taught(
    lesson: Lesson,
    parts: Sequence[LearningPart],
    settings: Learning,
    rates: Mapping[str, float],
    *,
    checkpoint: Path | None = None,
    run: str = "",
    team: Team | None = None,
    progress: Progress | None = None,
) -> LearningRecord:
    """Move the parts. Neither program is changed; the moves of the parts are, in place.

    Args:
        lesson: who learns, who teaches, by which windows.
        parts: what is learned.
        settings: for how long.
        rates: by kind, of Adam; ``settings.rate`` multiplies them.
        checkpoint: a file to save the run in now and then, and to go on from, to the same result; None for none. What
            else lies beside it has its name with another suffix.
        run: what the run depends on that neither the settings nor the numbers of windows and moves say.
        team: the ranks that share each step's windows.
        progress: called with (windows run, all windows that will be).

    Returns:
        What it was worth. Kinds of moves that do not help on the held-out windows are zeros again, and so is all where
        nothing helps.

    Raises:
        ConfigError: there is nothing to learn, or no window, or there are more ranks than windows to a step.
        ExportError: the checkpoint cannot be written.
        LearningError: the loss became no number.
    """
    team = team or Team()
    if not parts:
        raise ConfigError("there is nothing to learn: no constant of the program has moves of these kinds")
    if not lesson.shown or not lesson.held_out:
        raise ConfigError("learning needs windows to learn from and others to judge by; give more text")
    if settings.batch < team.size:
        raise ConfigError(
            f"{team.size} ranks share {settings.batch} windows to a step: learn with batch={team.size} or more, or "
            "with fewer ranks"
        )
    if checkpoint is not None:
        make_folder(checkpoint)
    rates = {kind: settings.rate * rates[kind] for kind in kinds_of(parts)}
    with _file(checkpoint) as path:
        about = f"{settings} {len(lesson.shown)} {len(lesson.held_out)} {_shapes(parts)} {lesson.described} {run}"
        writes = checkpoint is None or team.leads  # files of its own, or one of all ranks
        saved = Checkpoint(path, hashlib.sha256(about.encode()).hexdigest(), writes)
        return _Course(lesson, parts, settings, rates, saved, team, progress).run()


@contextmanager
def _file(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "learning.pt"


def _shapes(parts: Sequence[LearningPart]) -> list[tuple[int, ...]]:
    return [tuple(move.shape) for move in all_moves(parts)]


@dataclass
class _Course:
    """A run under way. What is saved of it is ``state``, beside the moves and the optimizer."""

    lesson: Lesson
    parts: Sequence[LearningPart]
    settings: Learning
    rates: Mapping[str, float]
    saved: Checkpoint
    team: Team
    progress: Progress | None
    state: dict[str, Any] = field(default_factory=dict, init=False)

    def run(self) -> LearningRecord:
        found = self.saved.load() or {}
        if [tuple(move.shape) for move in found.get("moves", [])] != _shapes(self.parts):
            found = {}  # somebody has changed it
        self.team.gathered(None)  # none saves before all have looked
        moves = all_moves(self.parts)
        if "ended" in found:
            set_moves(moves, found["moves"])
            return LearningRecord.from_dict(found["ended"])
        self.state = {key: found.get(key, start) for key, start in _start().items()}
        self._tick, self._total = self._counter(), self._expected(None)
        began = time.monotonic()
        if self.state["before"] is None:
            self.state["before"] = before = self._judged()
            if math.isnan(before):
                raise LearningError(
                    "the divergence on the windows held out is no number before anything is learned: see whether the "
                    "program returns numbers for them, or hold out others"
                )
        self._judging = time.monotonic() - began
        if "local" in self.settings.phases and self.state["phase"] == "local":
            if "block" in found:
                set_moves(moves, found["moves"])
            self._local(found.get("block", 0))
        if "full" in self.settings.phases:
            self._full(found if found.get("phase") == "full" else {})
        record = self._ended()
        self.saved.save({"ended": record.to_dict(), "moves": [move.detach() for move in moves]})
        return record

    def _local(self, first: int) -> None:
        """Fit block after block, from one of them on."""
        blocks = Blocks(self.lesson, self.parts, self.settings, self.rates, self.team, self._tick)
        self._total += blocks.windows
        for block, steps, loss in blocks.run(first):
            self.state["steps"] += steps
            self.state["losses"].append((self.state["steps"], loss))
            if self.saved.is_due:
                moves = [move.detach() for move in all_moves(self.parts)]
                self.saved.save(self.state | {"block": block + 1, "moves": moves})
        self._check()
        self.state["phase"], self.state["at"] = "full", 0

    def _full(self, found: Mapping[str, Any]) -> None:
        """Fit all parts together by what the program predicts."""
        self.state["phase"] = "full"
        if self.settings.minutes is None:
            self.state["total"] = self._steps()
        descent = Descent(self.parts, self.rates, self.team)
        if "adam" in found:
            descent.resume(found)
        began, timed, taken = time.monotonic(), 0.0, 0
        while self.state["total"] is None or self.state["at"] < self.state["total"]:
            at = self.state["at"]
            if taken == 1:
                timed = time.monotonic()  # the first step makes things that stay
            if self.state["total"] is None and taken == _TIMED + 1:
                self.state["total"] = self._affordable((time.monotonic() - timed) / _TIMED, time.monotonic() - began)
                self._total = self._expected(self.state["total"])
            loss = self._loss(at)
            descent.step(at, self.state["total"], loss)
            taken += 1
            self.state["at"] += 1
            self.state["steps"] += 1
            self._note(loss)
            if self._is_check() and self._check():
                break
            if self.saved.is_due:
                self.saved.save(self.state | descent.state())

    def _loss(self, at: int) -> float:
        """Add the gradients of this rank's windows of a step to the moves, and return the loss of all."""
        batch = [self._order(at * self.settings.batch + k) for k in range(self.settings.batch)]
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for index in self.team.dealt(batch):
            loss = self.lesson.loss(self.lesson.shown[index], values(self.parts)) / self.settings.batch
            torch.autograd.backward(loss)
            total += loss.detach().double().cpu()
            self._tick()
        return float(self.team.sum(total))

    def _order(self, at: int) -> int:
        """Return which window is the ``at``-th, of rounds that are each drawn anew."""
        turn, place = divmod(at, len(self.lesson.shown))
        if turn not in self._orders:
            generator = torch.Generator("cpu").manual_seed(self.settings.seed + 7919 * turn)
            count = len(self.lesson.shown)
            self._orders = {turn: torch.randperm(count, generator=generator, device="cpu").tolist()}
        found: int = self._orders[turn][place]
        return found

    _orders: dict[int, list[int]] = field(default_factory=dict, init=False)
    _judging: float = field(default=0.0, init=False)
    _total: int = field(default=0, init=False)
    _tick: Tick = field(default=lambda: None, init=False)

    def _steps(self) -> int:
        return self.settings.steps(len(self.lesson.shown))

    def _affordable(self, step: float, spent: float) -> int:
        """Return how many steps there is time for, by what one takes. All ranks take as many as the first."""
        assert self.settings.minutes is not None
        left = 60 * self.settings.minutes - spent - (_CHECKS + len(kinds_of(self.parts))) * self._judging
        steps = self.state["at"] + int(max(0.0, left) / max(step, 1e-9))
        return int(self.team.told(max(_TIMED + 1, min(self._steps(), steps))))

    def _note(self, loss: float) -> None:
        """Take down a loss for the curve, whose points are means over some steps."""
        latest = self.state["latest"]
        latest.append(loss)
        if self._is_check() or len(latest) >= max(1, (self.state["total"] or self._steps()) // (4 * _CHECKS)):
            self.state["losses"].append((self.state["steps"], sum(latest) / len(latest)))
            latest.clear()

    def _is_check(self) -> bool:
        total, at = self.state["total"], self.state["at"]
        return total is not None and (at == total or (at * _CHECKS // total) != ((at - 1) * _CHECKS // total))

    def _judged(self) -> float:
        """The divergence on the windows held out, by what rank 0 finds."""
        with torch.no_grad():
            return float(self.team.told(self.lesson.judged(values(self.parts), self._tick)))

    def _check(self) -> bool:
        """Judge what was learned so far and remember the best; return whether it has got worse for too long."""
        found = self._judged()
        found = math.inf if math.isnan(found) else found  # worse than any other
        self.state["checks"].append((self.state["steps"], found))
        best = min((each for _, each in self.state["checks"]), default=found)
        if found <= best and found < self.state["before"]:
            self.saved.remember(all_moves(self.parts), BEST)
        latest = [each for _, each in self.state["checks"][-_PATIENCE:]]
        return len(latest) == _PATIENCE and min(latest) > best

    def _ended(self) -> LearningRecord:
        """Take what was best, and leave out of that what does not help."""
        checks, before = self.state["checks"], self.state["before"]
        after = min(each for _, each in checks)
        kinds = kinds_of(self.parts)
        dropped: list[str] = []
        if after < before:
            if checks[-1][1] != after:
                self.team.gathered(None)  # it is there
                set_moves(all_moves(self.parts), self.saved.recalled(BEST))
            for kind in kinds if len(kinds) > 1 else ():
                with without(self.parts, kind):
                    found = self._judged()
                if found <= after:
                    dropped.append(kind)
                    after = found
                    set_moves(of_kind(self.parts, kind), None)
        else:
            dropped = list(kinds)
            set_moves(all_moves(self.parts), None)
        kept = tuple(kind for kind in kinds if kind not in dropped)
        losses, seen = tuple(map(tuple, self.state["losses"])), tuple(map(tuple, checks))
        inputs = len(self.lesson.held_out)
        return LearningRecord(before, after, inputs, kept, tuple(dropped), self.state["steps"], losses, seen)

    def _expected(self, total: int | None) -> int:
        """Return how many windows will be run."""
        steps = (total or self._steps()) if "full" in self.settings.phases else 0
        held = (_CHECKS + 1 + len(kinds_of(self.parts))) * len(self.lesson.held_out)
        return steps * self.settings.batch // self.team.size + held

    def _counter(self) -> Tick:
        """Tells ``progress`` of one more window whenever it is called."""
        done = itertools.count(1)

        def tick() -> None:
            if self.progress is not None:
                at = next(done)
                self.progress(min(at, self._total), self._total)

        return tick


def _start() -> dict[str, Any]:
    """What a run knows at its beginning."""
    return {"phase": "local", "before": None, "at": 0, "total": None, "steps": 0, "losses": [], "latest": [],
            "checks": []}  # fmt: skip

"""Block by block:  min over a block's moves  Σ over tokens ‖b̂(x̂) − b(x)‖² / ‖b(x)‖²,  in the memory of one block.

x are what the blocks before return in the original, x̂ what they return in the program that learns, which have learned
by then. A token's error is measured by its own length, because what follows norms it: without that a few tokens with
massive values would be all of the sum.

Sources: Li et al., BRECQ, arXiv 2102.05426; Chen et al., EfficientQAT, arXiv 2407.11062, the first phase.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.execution import block_run, blocks_of, flat_inputs, read_constants
from spinpass.progress import Tick
from spinpass.workers import Team

from .descent import Descent
from .lesson import Lesson
from .moves import LearningPart, values
from .settings import Learning

_EACH = 6  # constants to a block at least, so that attention and its MLP are fitted together
_TIMED = 3  # steps tell how long one takes

_Values = dict[Node, Any]


class Blocks:
    """The blocks of the two programs, and what lives between them for each window.

    Args:
        lesson: who learns, who teaches, by which windows.
        parts: what is learned, each where it is read first.
        settings: for how long.
        rates: by kind, of Adam.
        team: the ranks that share each step's windows.
        tick: called after every window that was run.

    Raises ConfigError: the program has no blocks, or the teacher's are others.
    """

    def __init__(
        self,
        lesson: Lesson,
        parts: Sequence[LearningPart],
        settings: Learning,
        rates: Mapping[str, float],
        team: Team,
        tick: Tick,
    ) -> None:
        self.lesson, self.parts, self.settings, self.rates = lesson, parts, settings, rates
        self.team, self.tick = team, tick
        given = [flat_inputs(lesson.student, each) for each in lesson.shown]
        counted = {place for part in parts for place in part.places}
        self._there = {node.name: node for node in lesson.teacher.graph.nodes}
        self.living = blocks_of(lesson.student, given[0], counted, _EACH, self._there)
        if self.living[-1][0].name not in self._there:
            raise ConfigError("the teacher has other nodes than the program that learns: quantize that very program")
        here = {node.name: node for node in lesson.student.graph.nodes}
        self.students: list[_Values] = [{here[name]: value for name, value in each.items()} for each in given]
        self.teachers: list[_Values] = [{self._there[name]: value for name, value in each.items()} for each in given]
        self.fitted: list[LearningPart] = []  # where it is read first
        self._steps: int | None = None if settings.minutes is not None else self._most

    def run(self, first: int) -> Iterator[tuple[int, int, float]]:
        """Fit one block after the other, from the ``first`` on, and yield its number, its steps, and their mean loss.

        The last block, which ends in the logits, is fitted to them as the others to what they return.

        Raises LearningError: the loss became no number.
        """
        for number, living in enumerate(self.living):
            if number >= first:
                yield (number, *self.fit(living))
            if living is not self.living[-1]:  # logits are many, and nothing reads them
                self.advance(living)

    @property
    def windows(self) -> int:
        """How many windows are run at most."""
        shown = len(self.students)
        return len(self.living) * (shown + self._most * self.settings.batch // self.team.size)

    @property
    def _most(self) -> int:
        return self.settings.steps(len(self.lesson.shown))

    def fit(self, living: Sequence[Node]) -> tuple[int, float]:
        """Move the parts that a block reads, and return the steps and the mean loss."""
        reads = read_constants(self.lesson.student, self.students[0], living)
        parts = [part for part in self.parts if reads.intersection(part.places) and part not in self.fitted]
        parts += [other for part in parts for other in part.depends if other not in self.fitted]
        parts = list(dict.fromkeys(parts))
        self.fitted += parts
        if not parts:
            return 0, 0.0
        fitted = [node for node in living if node not in self.students[0]]
        fixed = self._constants(reads, [part for part in self.parts if part not in parts])
        # what the teacher returns is computed once for each window, but for logits, of which there are too many
        kept = None if living is self.living[-1] else [self._wanted(k, fitted) for k in range(len(self.students))]
        descent, total, began = Descent(parts, self.rates, self.team), 0.0, 0.0
        generator = torch.Generator("cpu").manual_seed(self.settings.seed)
        order: list[int] = []
        at = 0
        while self._steps is None or at < self._steps:
            if at == 1:
                began = time.monotonic()
            if self._steps is None and at == _TIMED + 1:
                self._steps = self._affordable((time.monotonic() - began) / _TIMED)
            batch = []
            for _ in range(self.settings.batch):
                order = order or torch.randperm(len(self.students), generator=generator, device="cpu").tolist()
                batch.append(order.pop())
            wanted = [self._wanted(k, fitted) if kept is None else kept[k] for k in batch]
            loss = self._loss(list(zip(batch, wanted, strict=True)), fitted, fixed, parts)
            descent.step(at, self._steps, loss)
            total += loss
            at += 1
        return at, total / at

    def advance(self, living: Sequence[Node]) -> None:
        """Run the block with what its constants have become, in both programs, and keep what lives behind it."""
        reads = read_constants(self.lesson.student, self.students[0], living)
        self.fitted += [part for part in self.parts if reads.intersection(part.places) and part not in self.fitted]
        with torch.no_grad():
            fixed = self._constants(reads, self.parts)
        inputs = {node for node in self.students[0] if node.op == "placeholder"}
        for window, given in enumerate(self.students):
            found = block_run(self.lesson.student, given, living, fixed)
            self.students[window] = {node: given[node] for node in inputs} | found
            taught = self.teachers[window]
            wanted = block_run(self.lesson.teacher, taught, self._same(living), {})
            self.teachers[window] = {node: value for node, value in taught.items() if node.op == "placeholder"} | wanted
            self.tick()

    def _affordable(self, step: float) -> int:
        """Return how many steps of a block there is time for. All ranks take as many as the first."""
        assert self.settings.minutes is not None
        seconds = 60 * self.settings.minutes / len(self.living)
        return int(self.team.told(max(_TIMED + 1, min(self._most, int(seconds / max(step, 1e-9))))))

    def _constants(self, reads: set[str], parts: Sequence[LearningPart]) -> dict[str, Tensor]:
        """The constants that some parts have for a block by now."""
        read = [part for part in parts if reads.intersection(part.places)]
        return {name: value.detach() for name, value in values(read).items()}

    def _loss(
        self,
        batch: Sequence[tuple[int, Sequence[Any]]],
        fitted: Sequence[Node],
        fixed: Mapping[str, Tensor],
        parts: Sequence[LearningPart],
    ) -> float:
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for window, wanted in self.team.dealt(batch):
            constants = {**fixed, **values(parts)}
            found = block_run(self.lesson.student, self.students[window], fitted, constants, gradients=True)
            pairs = zip(found.values(), wanted, strict=True)
            loss = sum(_relative(a, b) for a, b in pairs if _is_fitted(a)) / len(batch)
            torch.autograd.backward(loss)
            self.tick()
            total += loss.detach().double().cpu()
        return float(self.team.sum(total))

    def _wanted(self, window: int, fitted: Sequence[Node]) -> list[Any]:
        """What the teacher returns where a block is fitted."""
        return list(block_run(self.lesson.teacher, self.teachers[window], self._same(fitted), {}).values())

    def _same(self, nodes: Sequence[Node]) -> list[Node]:
        return [self._there[node.name] for node in nodes]


def _is_fitted(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


def _relative(found: Tensor, wanted: Tensor) -> Any:
    """The mean over tokens of ‖ŷ − y‖² / ‖y‖²."""
    error = (found.float() - wanted.float()).square().sum(-1)
    length = wanted.float().square().sum(-1)
    return (error / length.clamp_min(1e-9 * float(length.mean()) + 1e-30)).mean()

"""Several models prefill and decode in turns; their speeds are compared round by round.

In every round each model is loaded anew, so that none keeps a lucky place in memory, in an order drawn anew. With one
thread the clock is CPU time of the process, which other programs on the machine stretch little; with more it is
wall-clock time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spinpass.progress import Progress
from spinpass.runtime import DecoderGraph, State, to_ort

PHASES = ("decode", "prefill")
VOCABULARY = 256  # ids are drawn below: every tokenizer has as many
Times = dict[str, list[float]]  # phase -> seconds of each round


@dataclass(frozen=True)
class Work:
    """What every model does in a round, and how many rounds there are."""

    prompt: int
    new: int
    repeats: int
    threads: int

    @property
    def clock(self) -> Callable[[], float]:
        """What tells seconds. Threads that wait in a loop count as busy, so CPU time says nothing of several."""
        return time.process_time if self.threads == 1 else time.perf_counter

    @property
    def about(self) -> str:
        """What a caption says of it."""
        clock = "CPU time, 1 thread" if self.threads == 1 else f"wall-clock time, {self.threads} threads"
        return (
            f"{clock}, median of {self.repeats} rounds (quartiles); {self.new} tokens after a prompt of {self.prompt}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Its JSON-able form."""
        return asdict(self) | {"clock": "CPU" if self.threads == 1 else "wall"}


class Contender(Protocol):
    """A model in some runtime, which takes part."""

    def round(self, work: Work, ids: list[int], /) -> dict[str, float]:
        """Load it and run it; returns seconds of the prompt and the median of those of one token."""


@dataclass(frozen=True)
class OrtContender:
    """A folder with a graph that decodes in ONNX Runtime, and whether the same graph reads prompts.

    ``all_logits``: a prompt gives the logits of all its tokens, though the file may have those of the last alone.
    """

    folder: Path
    reads_prompt: bool = True
    all_logits: bool = False

    def round(self, work: Work, ids: list[int]) -> dict[str, float]:
        """See :class:`Contender`."""
        path, found = self.folder / "model.onnx", dict[str, float]()
        graph = DecoderGraph.open(path, threads=work.threads)
        if self.all_logits and graph.last_alone:
            graph = graph.of_every_token(path)
        tokens, state = torch.tensor([ids]), _filled(graph, work.prompt)
        if self.reads_prompt:
            for _ in ("to warm up", "to measure"):
                state = graph.start(1)
                found["prefill"] = _seconds(graph, tokens[:, : work.prompt], state, work.clock)
        after = tokens[:, work.prompt :].split(1, 1)
        found["decode"] = statistics.median(_seconds(graph, token, state, work.clock) for token in after)
        return found


def _seconds(graph: DecoderGraph, ids: Tensor, state: State, clock: Callable[[], float]) -> float:
    began = clock()
    graph.step(ids, state)
    return clock() - began


def _filled(graph: DecoderGraph, length: int) -> State:
    """Make a cache of so many tokens that nobody has read."""
    generator = torch.Generator().manual_seed(0)
    shapes = {s: [length if n == 0 else abs(n) for n in s.empty] for s in graph.cache}
    seen = torch.ones(1, length, dtype=torch.int64)
    return State(seen, {s.name: to_ort(torch.randn(shapes[s], generator=generator).to(s.dtype)) for s in graph.cache})


def measured(contenders: Mapping[str, Contender], work: Work, progress: Progress) -> dict[str, Times]:
    """Let all of them run; returns the seconds of each round."""
    ids = torch.randint(VOCABULARY, (work.prompt + work.new,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[str, Times] = {name: {phase: [] for phase in PHASES} for name in contenders}
    order = random.Random(0)
    for turn in range(work.repeats):
        for done, name in enumerate(order.sample(list(contenders), len(contenders)), 1):
            for phase, seconds in contenders[name].round(work, ids).items():
                times[name][phase].append(seconds)
            progress(turn * len(contenders) + done, work.repeats * len(contenders))
    return times


def compared(times: Times, base: Times) -> dict[str, Any]:
    """Seconds of each phase that both have, and the speed as a multiple of the base's, with quartiles over rounds."""
    found: dict[str, Any] = {}
    for phase in PHASES:
        if times[phase] and base[phase]:
            ratios = [b / a for a, b in zip(times[phase], base[phase], strict=True)]
            low, middle, high = statistics.quantiles(ratios * (1 if len(ratios) > 1 else 2), method="inclusive")
            found[phase] = {"seconds": statistics.median(times[phase]), "ratio": middle, "quartiles": [low, high]}
    return found


def cells(row: dict[str, Any], phase: str) -> tuple[str, str]:
    """Milliseconds and ratio as a table shows them."""
    if phase not in row:
        return "", ""
    low, high = row[phase]["quartiles"]
    return f"{1e3 * row[phase]['seconds']:.1f}", f"{row[phase]['ratio']:.3f} ({low:.3f}–{high:.3f})"

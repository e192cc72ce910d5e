"""What a decoder costs: tokens per second. Times are taken in turns, so that a slow minute of the machine meets all of
the decoders.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spinpass.errors import ConfigError
from spinpass.progress import Progress


class Timed(Protocol):
    """The rates of one generation, in tokens per second."""

    @property
    def prefill_rate(self) -> float: ...
    @property
    def decode_rate(self) -> float: ...


class Generator(Protocol):
    """Anything that continues token ids and says how long it took."""

    def generate(self, ids: Sequence[int], max_new_tokens: int, /, *, end: Any = None) -> Timed: ...


@dataclass(frozen=True)
class Speed:
    """The rates of a decoder, medians over repeats, in tokens per second."""

    prefill: float
    decode: float
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "prefill_tokens_per_second": self.prefill,
            "decode_tokens_per_second": self.decode,
            "repeats": self.repeats,
        }


def speed(
    decoders: Mapping[str, Generator],
    prompt: Sequence[int],
    new_tokens: int,
    *,
    repeats: int = 3,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Generate ``new_tokens`` after ``prompt`` with every decoder in turn, ``repeats`` times after one turn to warm up.

    Raises ConfigError for fewer than two new tokens (the first comes from the prompt's pass) or fewer than one repeat.
    """
    if new_tokens < 2 or repeats < 1:
        raise ConfigError(f"{repeats} repeats of {new_tokens} tokens: at least one repeat of two tokens is needed")
    times: dict[str, list[Timed]] = {name: [] for name in decoders}
    for turn in range(repeats + 1):
        for k, (name, decoder) in enumerate(decoders.items()):
            times[name].append(decoder.generate(prompt, new_tokens if turn else 2, end=()))
            if progress is not None:
                progress(turn * len(decoders) + k + 1, (repeats + 1) * len(decoders))
    return {name: _medians(measured[1:]) for name, measured in times.items()}


def _medians(times: Sequence[Timed]) -> Speed:
    prefill = statistics.median(t.prefill_rate for t in times)
    return Speed(prefill, statistics.median(t.decode_rate for t in times), len(times))

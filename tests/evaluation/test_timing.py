"""Speeds, of decoders whose times are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from spinpass.errors import ConfigError
from spinpass.evaluation import timing as evaluation


@dataclass
class Clock:
    """Reports prepared rates; remembers what it was asked."""

    rates: list[tuple[float, float]]
    asked: list[tuple[str, int, Any]]
    name: str = ""

    def generate(self, ids: Sequence[int], max_new_tokens: int, /, *, end: Any = None) -> Any:
        self.asked.append((self.name, max_new_tokens, end))
        prefill, decode = self.rates.pop(0)
        return type("Times", (), {"prefill_rate": prefill, "decode_rate": decode})()


def test_speed_takes_turns_and_leaves_out_the_first() -> None:
    asked: list[tuple[str, int, Any]] = []
    clocks = {
        name: Clock([(1, 1), (10 * k, 5 * k), (30 * k, 7 * k), (20 * k, 6 * k)], asked, name)
        for k, name in ((1, "a"), (2, "b"))
    }
    ticks: list[tuple[int, int]] = []
    found = evaluation.speed(clocks, [1, 2], 8, repeats=3, progress=lambda *at: ticks.append(at))
    assert found == {"a": evaluation.Speed(20, 6, 3), "b": evaluation.Speed(40, 12, 3)}
    assert asked[:4] == [("a", 2, ()), ("b", 2, ()), ("a", 8, ()), ("b", 8, ())]
    assert ticks[-1] == (8, 8)
    assert found["a"].to_dict()["decode_tokens_per_second"] == 6


@pytest.mark.parametrize(("tokens", "repeats"), [(1, 3), (8, 0)])
def test_speed_needs_something_to_time(tokens: int, repeats: int) -> None:
    with pytest.raises(ConfigError, match="at least one repeat of two tokens"):
        evaluation.speed({}, [1], tokens, repeats=repeats)

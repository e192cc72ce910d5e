"""Perplexity and speed, on decoders whose figures are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.evaluation import comparison as evaluation


@dataclass
class Certain:
    """Gives the token after the last one the probability p; the other three of the vocabulary share the rest."""

    p: float

    def logits(self, ids: Sequence[int], /) -> Tensor:
        probabilities = torch.full((len(ids), 4), (1 - self.p) / 3)
        probabilities[range(len(ids)), [(i + 1) % 4 for i in ids]] = self.p
        return probabilities.log()


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


def test_windows_spread_over_the_text() -> None:
    assert evaluation.windows(list(range(100)), 10, 3) == [list(range(s, s + 10)) for s in (0, 33, 66)]
    assert evaluation.windows([7, 8], 2, 1) == [[7, 8]]


@pytest.mark.parametrize(
    ("length", "count", "reason"),
    [
        (1, 1, "at least one window of two tokens"),
        (4, 0, "0 windows of 4 tokens"),
        (6, 2, "need 12 tokens; the text has 10"),
    ],
)
def test_windows_that_do_not_fit(length: int, count: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        evaluation.windows(list(range(10)), length, count)


def test_perplexity_of_a_known_distribution() -> None:
    seen: list[tuple[int, int]] = []
    found = evaluation.perplexity(Certain(0.5), [[0, 1, 2, 3], [1, 2, 3, 0]], lambda *at: seen.append(at))
    assert found.value == pytest.approx(2, rel=1e-6)
    assert found.tokens == 6
    assert found.error == pytest.approx(0, abs=1e-6)
    assert seen == [(1, 2), (2, 2)]


def test_perplexity_counts_what_was_not_expected() -> None:
    found = evaluation.perplexity(Certain(0.7), [[0, 1, 3]])  # 3 after 1 has probability 0.1
    assert found.loss == pytest.approx(-(math.log(0.7) + math.log(0.1)) / 2, rel=1e-6)
    assert math.isnan(found.error)
    assert json.loads(json.dumps(found.to_dict()))["standard_error"] is None


def test_perplexity_needs_windows() -> None:
    with pytest.raises(ConfigError, match="no windows to evaluate on"):
        evaluation.perplexity(Certain(0.5), [])


def test_standard_error_over_windows() -> None:
    found = evaluation.Perplexity((1.0, 2.0, 3.0), 30)
    assert found.loss_error == pytest.approx(1 / math.sqrt(3))
    assert found.error == pytest.approx(math.exp(2) / math.sqrt(3))


def test_change_is_paired() -> None:
    before, after = evaluation.Perplexity((1.0, 5.0), 2), evaluation.Perplexity((1.1, 5.1), 2)
    found = evaluation.change(before, after)
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(0, abs=1e-12)  # though the windows differ by 4
    assert found.percent == pytest.approx(100 * (math.exp(0.1) - 1))


def test_change_needs_the_same_windows() -> None:
    with pytest.raises(ConfigError, match="2 and 1 windows cannot be compared in pairs"):
        evaluation.change(evaluation.Perplexity((1.0, 2.0), 2), evaluation.Perplexity((1.0,), 1))


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


def test_a_comparison_of_known_distributions() -> None:
    p, q = 0.7, 0.4
    found = evaluation.compare(Certain(p), Certain(q), [[0, 1, 2, 3], [2, 3, 0, 1]])
    assert found.before.loss == pytest.approx(-math.log(p)) and found.after.loss == pytest.approx(-math.log(q))
    assert found.ratio == pytest.approx(p / q)
    assert found.divergence == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert found.agreement == 1.0 and found.before.tokens == 6
    other = evaluation.compare(Certain(0.7), Certain(0.1), [[0, 1, 2, 3]])
    assert other.agreement == 0.0
    assert json.loads(json.dumps(other.to_dict()))["kl_error"] is None, "one window has no standard error"
    with pytest.raises(ConfigError, match="no windows"):
        evaluation.compare(Certain(0.5), Certain(0.5), [])

"""Perplexity and comparisons, on decoders whose figures are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

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

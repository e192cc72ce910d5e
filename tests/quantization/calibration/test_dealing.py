"""What several ranks round together is what one rounds."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from spinpass.errors import ConfigError, WorkerError
from spinpass.execution.interpreter import constants
from spinpass.quantization import QuantizationConfig, Quantized, QuantizedWeight, Weights, quantize
from spinpass.quantization.calibration import calibrator, dealing
from spinpass.quantization.rounding import Moments
from spinpass.workers import Team
from tests.support import experts
from tests.support.quantizable import inputs, outlying, program
from tests.support.threads import by_ranks

PARTS = ("q", "scales", "zeros", "index")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "_ROWS", 20)
    monkeypatch.setattr(calibrator, "_BATCH", 1 << 14)


def same(one: Quantized, other: Quantized) -> bool:
    first, second = constants(one.program), constants(other.program)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scheme", ["w4g16-rtn-head8-embed8", "w8-rtn-a8static", "w4g16-rtn-a4", "w4g16-rtn-a8channel"])
@pytest.mark.parametrize("size", [2, 3])
def test_to_nearest_and_ranges_are_the_same_bit_for_bit(scheme: str, size: int) -> None:
    shown = inputs(5)
    alone = quantize(outlying(), scheme, shown)
    found = by_ranks(size, lambda team: quantize(outlying(), scheme, shown, team=team))
    assert all(same(each, alone) for each in found)


@pytest.mark.parametrize(("scheme", "follow"), [("w4g16-gptq-head8-embed8", False), ("w3-asym-gptq-a8", True), ("w3-gptq-fisher", True)])
def test_gptq_has_the_same_codes_but_for_the_order_of_sums(scheme: str, follow: bool) -> None:
    shown, parsed = inputs(4), QuantizationConfig.parse(scheme)
    assert parsed.weights is not None
    asked = replace(parsed, weights=replace(parsed.weights, follow=follow))
    alone = quantize(program(), asked, shown).report.weights
    first, second = (each.report.weights for each in by_ranks(2, lambda team: quantize(program(), asked, shown, team=team)))
    differing = total = 0
    for name, weight in alone.items():
        assert all(torch.equal(getattr(first[name].codes, part), getattr(second[name].codes, part)) for part in PARTS[:3])
        differing += int((first[name].codes.q != weight.codes.q).sum())
        total += weight.codes.q.numel()
        assert first[name].error == second[name].error == pytest.approx(weight.error, rel=1e-3)
    assert differing <= 0.001 * total


def test_experts_have_the_tokens_of_all_ranks() -> None:
    made = experts.program(2, "grouped_mm")
    given = made.example_inputs
    alone = quantize(made, "w4g16-gptq", [given, given]).report.weights
    for found in by_ranks(2, lambda team: quantize(made, "w4g16-gptq", [given, given], team=team)):
        for name, weight in alone.items():
            assert found.report.weights[name].tokens == weight.tokens
            differing = int((found.report.weights[name].codes.q != weight.codes.q).sum())
            assert differing <= 0.001 * weight.codes.q.numel()


def test_every_rank_rounds_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, plain = Counter[int](), dealing._rounded
    monkeypatch.setattr(dealing, "_rounded", lambda *given: (counts.update([threading.get_ident()]), plain(*given))[1])
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(9))
    jobs = [dealing.Job(f"w{k}", torch.randn(rows, 32), 1, Weights(4, 16)) for k, rows in enumerate((65, 20, 30))]

    def act(team: Team) -> list[QuantizedWeight]:
        return dealing.Dealer(team).rounded(jobs, Moments.of(team.dealt([x, x]), team.dealt([x, x]), team))

    first, second = by_ranks(2, act)
    assert sorted(counts.values()) == [3, 4], "of four pieces, one, and two"
    assert all(torch.equal(a.codes.q, b.codes.q) and len(a.codes.q) == len(job.stored) for a, b, job in zip(first, second, jobs))


class Kept:
    """A store that all ranks see, but for one that does not see what others put there."""

    def __init__(self, blind: int | None = None) -> None:
        self.weights: dict[str, QuantizedWeight] = {}
        self.blind = blind

    def of(self, team: Team) -> Any:
        kept = self

        class Store:
            def get(self, name: str, scheme: Weights) -> QuantizedWeight | None:
                return None if team.rank == kept.blind else kept.weights.get(name)

            def put(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
                assert team.leads, "rank 0 keeps what all have rounded"
                kept.weights[name] = weight
                return weight

        return Store()


def test_what_is_kept_is_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, shown = Kept(), inputs(2)
    found = by_ranks(2, lambda team: quantize(program(), "w4g16-gptq", shown, store=kept.of(team), team=team))
    assert all(each.report.weights[name] is kept.weights[name] for each in found for name in kept.weights)
    again = dict(kept.weights)
    by_ranks(2, lambda team: quantize(program(), "w4g16-gptq", shown, store=kept.of(team), team=team))
    assert all(kept.weights[name] is again[name] for name in again), "what one run has rounded, the next does not"
    monkeypatch.setattr(dealing, "_SEEN_WITHIN", 0.2)
    blind = Kept(blind=1)
    with pytest.raises(WorkerError, match=r"rank 1 of 2 does not see what rank 0 has kept of .*: OUT has to lie in a folder"):
        by_ranks(2, lambda team: quantize(program(), "w4g16-gptq", shown, store=blind.of(team), team=team))


def test_there_is_an_input_for_every_rank() -> None:
    with pytest.raises(ConfigError, match="3 workers and 2 calibration windows: start at most 2 workers, or read more"):
        by_ranks(3, lambda team: quantize(program(), "w4g16-gptq", inputs(2), team=team))

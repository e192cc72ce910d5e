"""Tuning: rotation is kept where it helps on text that nothing was calibrated on, and left where it does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch.export import ExportedProgram

from spinpass import RotationConfig, tuning
from spinpass.errors import ConfigError
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.execution.interpreter import run
from spinpass.learning import Learning
from spinpass.planning import RotationPlan
from spinpass.quantization import QuantizationConfig
from spinpass.quantization.calibration.site_error import site_errors
from spinpass.tuning import SpaceVerdict, Trial, candidates, choose, confirmed, tune
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made, with_outliers


@cache
def program(outliers: bool) -> ExportedProgram:
    """Two channels of the stream far above the others, or nothing to level: weights and inputs are even as they are."""
    model = made(Decoder(layers=2), dtype=torch.float32)
    with_outliers(model, *(() if outliers else (1.0, 1.0)))
    return exported(model, dynamic_shapes={"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}})


def windows(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count, 4 * SEQ), generator=generator).tolist()


def compared(*divergences: float) -> Comparison:
    losses = Perplexity((1.0,) * len(divergences), 10)
    return Comparison(losses, losses, 1.0, divergences)


def test_rotation_is_kept_where_there_are_outliers() -> None:
    found = tune(program(True), "a4", windows(2, 0), windows(6, 1))
    names = {t.name for t in found.trials}
    assert {n.removesuffix(", where it helps") for n in names} == {"none", *candidates()}
    assert found.chosen.plan is not None and found.chosen.name in found.verdict
    none = found.trials[0]
    assert found.chosen.comparison.divergence < 0.7 * none.comparison.divergence
    ids = torch.tensor(windows(1, 2))
    assert torch.allclose(run(found.program, (ids,))[0], run(program(True), (ids,))[0], atol=1e-4), "same function"
    assert not torch.equal(run(found.quantized.program, (ids,))[0], run(found.program, (ids,))[0])
    json.dumps(found.to_dict())


def test_trials_are_calibrated_where_they_need_not_be() -> None:
    """What four-bit tokens are clipped to is chosen on the calibration inputs, where there are any."""
    found = tune(program(True), "a4", windows(2, 0), windows(2, 1), configs={})
    rounded = [n for n in found.quantized.program.graph.nodes if str(n.target) == "spinpass.round_tokens.default"]
    assert any(n.args[3] < 1 for n in rounded)


def test_scales_of_what_was_chosen_are_distilled() -> None:
    shown, decisive = windows(16, 0), windows(4, 1)
    configs = {"online": RotationConfig(form="online", verify=False)}
    plain, trained = (
        tune(program(True), f"w2-rtn{part}", shown, decisive, configs=configs) for part in ("", "-distill16")
    )
    assert trained.chosen.name == f"{plain.chosen.name}, learning scales" and trained.chosen.learned == ("scales",)
    assert [t.comparison for t in trained.trials[:-1]] == [t.comparison for t in plain.trials], "trials are made without"
    ids = (torch.tensor(windows(2, 3)),)
    wanted, *found = (
        torch.log_softmax(run(p, ids)[0].double(), -1)
        for p in (program(True), plain.quantized.program, trained.quantized.program)
    )
    before, after = ((wanted.exp() * (wanted - f)).sum(-1).mean() for f in found)
    assert after < 0.9 * before


def test_kinds_are_tried_and_what_text_confirms_is_kept() -> None:
    shown, decisive = windows(16, 0), windows(4, 1)
    configs = {"online": RotationConfig(form="online", verify=False)}
    kinds = [Learning(("scales",), rounds=8), Learning(("transforms", "scales"), rounds=2), Learning(("gains",), rate=1e-9)]
    found = tune(program(True), "w3-rtn-a4", shown, decisive, configs=configs, learning=kinds)
    tried = [t for t in found.trials if t.learned]
    assert all(set(t.learned) <= {"scales", "transforms", "gains"} for t in tried)
    assert found.chosen.learned, "scales help at three bits"
    assert found.chosen.comparison.divergence == min(t.comparison.divergence for t in found.trials)
    assert found.to_dict()["trials"][-1]["learned"]
    # where nothing was rotated there is no basis to learn
    alone = tune(program(False), "w3-rtn", shown, decisive, configs={}, learning=[Learning(("transforms",))])
    assert [t.name for t in alone.trials] == ["none"]


def test_what_was_learned_is_left_where_text_does_not_confirm_it() -> None:
    chosen = dear("best", 0.10, 0.14, 0.12)
    noisy = replace(dear("noisy", 0.09, 0.145, 0.115), learned=("scales",))
    assert confirmed(chosen, [chosen, noisy]) is chosen
    better = replace(dear("better", 0.05, 0.09, 0.07), learned=("scales",))
    assert confirmed(chosen, [chosen, noisy, better]) is better
    assert confirmed(chosen, [chosen, dear("not learned", 0.01, 0.01, 0.01)]) is chosen


def test_kinds_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing that can be learned"):
        tune(program(True), "w3-rtn", windows(2, 0), windows(2, 1), configs={}, learning=[Learning(("scale",))])


def dear(name: str, *divergences: float, flops: int = 7) -> Trial:
    return Trial(name, cast(RotationPlan, SimpleNamespace(flops=flops)), compared(*divergences), ())


def test_what_costs_nothing_wins_unless_something_is_better_beyond_the_noise() -> None:
    free = Trial("none", None, compared(0.10, 0.12, 0.11), ())
    noisy = dear("noisy", 0.09, 0.125, 0.10)
    assert choose([free, noisy]) is free, "better by 5 %, with a standard error as large"
    better = dear("better", 0.05, 0.06, 0.055)
    assert choose([free, noisy, better]) is better


def test_the_cheapest_rotation_wins_only_where_it_is_about_as_good() -> None:
    """Within the noise is not enough: few windows would then choose a worse one."""
    free, best = Trial("none", None, compared(0.9, 0.8, 0.7), ()), dear("best", 0.10, 0.14, 0.12)
    worse, same = dear("worse", 0.13, 0.12, 0.12, flops=3), dear("same", 0.10, 0.141, 0.12, flops=5)
    assert choose([free, best, worse]) is best
    assert choose([free, best, worse, same]) is same


def test_all_spaces_are_tried_beside_those_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers judged by themselves are a hint: the text decides whether spaces are left out."""

    def all_but_one(_: object, plan: RotationPlan, rotated: object) -> tuple[SpaceVerdict, ...]:
        return tuple(SpaceVerdict(s.name, 1.0, 2.0 if n == 0 else 0.5) for n, s in enumerate(plan.spaces))

    monkeypatch.setattr(tuning._Tuning, "_judge", all_but_one)
    configs = {"online": RotationConfig(form="online", verify=False)}
    found = tune(program(True), "a4", windows(1, 0), windows(2, 1), configs=configs)
    counts = {t.name: 0 if t.plan is None else len(t.plan.spaces) for t in found.trials}
    assert list(counts) == ["none", "online", "online, where it helps"]
    assert counts["online, where it helps"] == counts["online"] - 1 > 0


def test_a_space_in_which_nothing_is_rounded_is_left_alone() -> None:
    found = tune(program(True), "a4", windows(2, 0), windows(4, 1))
    verdicts = {v.space: v for t in found.trials if t.name == "online" for v in t.spaces}
    r3 = [v for name, v in verdicts.items() if name.startswith("R3")]
    assert r3 and not any(v.helps for v in r3), "no cache is rounded"
    online = next(t for t in found.trials if t.name == "online")
    assert online.plan is not None and not any(s.role == "R3" for s in online.plan.spaces)
    cached = tune(program(True), "kv4", windows(1, 0), windows(4, 1), configs={"online": RotationConfig(form="online")})
    kept = next(t.plan for t in cached.trials if t.plan is not None)
    assert {s.role for s in kept.spaces} == {"R2", "R3"}, "nothing but the cache is rounded"


def test_a_verdict_needs_both_bases() -> None:
    assert SpaceVerdict("a", 2.0, 1.0).helps and not SpaceVerdict("a", 1.0, 2.0).helps
    assert not SpaceVerdict("a", None, 1.0).helps and not SpaceVerdict("a", math.inf, None).helps


def test_errors_of_sites_are_those_of_rounding_them_alone() -> None:
    source = program(True)
    config = QuantizationConfig.parse("w4-rtn-a4")
    ids = torch.tensor(windows(2, 3))
    found = site_errors(source, config, [(ids,)])
    assert len(found) == 14 and "head.weight" not in found
    name = "blocks.0.mlp.down.weight"
    only = replace(config, weights=None, activations=None, overrides={name: replace(config.weights, method="rtn")})  # type: ignore[type-var]
    assert 0 < site_errors(source, only, [(ids,)])[name] < found[name], "with its input rounded as well it loses more"
    assert set(site_errors(source, only, [(ids,)])) == {name}
    assert site_errors(source, QuantizationConfig.parse("kv4"), [(ids,)]) == {}


def test_tuning_needs_text_to_decide_on() -> None:
    with pytest.raises(ConfigError, match="a window to calibrate on and at least two others"):
        tune(program(False), "w4", windows(1, 0), windows(1, 1))
    with pytest.raises(ConfigError, match="a window to calibrate on"):
        tune(program(False), "w4", [], windows(2, 1))
    with pytest.raises(ConfigError, match="is not a part of a scheme"):
        tune(program(False), "w4x", windows(1, 0), windows(2, 1))

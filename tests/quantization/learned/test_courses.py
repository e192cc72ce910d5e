"""A course of learning: it goes on where it was stopped, ranks share it, and what does not help is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spinpass.errors import ConfigError, LearningError
from spinpass.learning import Learning, Lesson, checkpoint
from spinpass.quantization import Quantized, learned, quantize
from spinpass.workers import Team
from tests.support import ranks
from tests.support.quantizable import inputs, program

ALL = ("scales", "offsets", "zeros", "gains", "clips")


@cache
def made(scheme: str = "w2g16-rtn-asym-a4-kv4") -> Quantized:
    return quantize(program(), scheme)


def numbers(quantized: Quantized) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in quantized.program.state_dict.items()}


def same(a: Quantized, b: Quantized) -> bool:
    one, other = numbers(a), numbers(b)
    graphs = [[(n.name, n.args[1:]) for n in q.program.graph.nodes if "round_tokens" in n.name] for q in (a, b)]
    return graphs[0] == graphs[1] and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("phases", [("full",), ("local",), ("local", "full")], ids="+".join)
def test_a_run_that_was_stopped_goes_on_to_the_same_result(
    phases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    settings = Learning(ALL, phases, rounds=2, rate=10)
    whole = learned(program(), made(), inputs(17), settings)
    file, done = tmp_path / "run.pt", []

    def stop(at: int, total: int) -> None:
        done.append(at)
        if len(done) > 0.6 * total:
            raise Stopped

    with pytest.raises(Stopped):
        learned(program(), made(), inputs(17), settings, checkpoint=file, progress=stop)
    assert file.exists()
    steps: list[int] = []
    rest = learned(program(), made(), inputs(17), settings, checkpoint=file, progress=lambda at, total: steps.append(at))
    assert same(whole, rest) and rest.report.learning == whole.report.learning
    assert len(steps) < len(done)


def test_what_another_run_has_saved_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    file = tmp_path / "run.pt"
    learned(program(), made(), inputs(17), Learning(rate=10), checkpoint=file)
    for settings, damage in ((Learning(rate=20), False), (Learning(rate=10, seed=1), False), (Learning(rate=10), True)):
        if damage:
            file.write_bytes(file.read_bytes()[:1000])
        found = learned(program(), made(), inputs(17), settings, checkpoint=file)
        assert same(found, learned(program(), made(), inputs(17), settings))
    edited = torch.load(file, weights_only=True)
    torch.save(edited | {"moves": edited["moves"][:1]}, file)
    assert same(learned(program(), made(), inputs(17), Learning(rate=10), checkpoint=file), found)


def test_a_run_is_saved_soon_and_in_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def write(path: Path, content: object) -> None:
        now[0] += 2  # seconds, for many moves

    monkeypatch.setattr(checkpoint, "_write", write)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = checkpoint.Checkpoint(tmp_path / "run.pt", "a run")
    run._last, due = 0.0, []
    while now[0] < 400:
        now[0] += 1
        if run.is_due:
            due.append(now[0])
            run.save({})
    assert due == [20, 122, 224, 326]


def test_seeds_draw_other_orders_and_the_same_seed_the_same() -> None:
    one, again, other = (learned(program(), made(), inputs(17), Learning(rate=10, seed=s)) for s in (0, 0, 1))
    assert same(one, again) and not same(one, other)


def test_kinds_that_do_not_help_are_left_out() -> None:
    found = learned(program(), made(), inputs(17), Learning(("scales", "zeros"), rounds=4, rate=20))
    course = found.report.learning
    assert course is not None and set(course.kinds) | set(course.dropped) == {"scales", "zeros"}
    for kind, same_as in (("zeros", "zeros"), ("scales", "scales")):
        if kind in course.dropped:
            for name, weight in found.report.weights.items():
                assert torch.equal(getattr(weight.codes, same_as), getattr(made().report.weights[name].codes, same_as))
    harmful = learned(program(), made(), inputs(17), Learning(("scales", "gains"), rate=3000))
    assert harmful.report.learning is not None and not harmful.report.learning.kept
    assert same(harmful, made())


def test_the_best_check_is_taken_and_three_worse_ones_in_a_row_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    said = iter([1.0, 0.5, 0.4, 0.6, 0.7, 0.8])

    def judged(lesson: Lesson, constants: dict[str, torch.Tensor], tick: object) -> float:
        seen.append({name: value.clone() for name, value in constants.items()})
        return next(said)

    monkeypatch.setattr(Lesson, "judged", judged)
    found = learned(program(), made(), inputs(17), Learning(("offsets",), rounds=4, rate=10))
    course = found.report.learning
    assert course is not None and (course.before, course.after) == (1.0, 0.4)
    assert [each for _, each in course.checks] == [0.5, 0.4, 0.6, 0.7, 0.8] and course.steps < 4 * 16
    places = {spec.target: spec.arg.name for spec in found.program.graph_signature.input_specs}
    for name, tensor in numbers(found).items():
        if places[name] in seen[2]:
            assert torch.equal(tensor, seen[2][places[name]])


def test_a_text_of_its_own_decides() -> None:
    found = learned(program(), made(), inputs(8), Learning(rate=10), held_out=inputs(40)[30:]).report.learning
    assert found is not None and found.inputs == 10 and found.steps == 8


def test_minutes_bound_the_steps() -> None:
    found = learned(program(), made(), inputs(17), Learning(rounds=1000, minutes=0.02)).report.learning
    assert found is not None and 4 <= found.steps < 1000


@pytest.mark.parametrize("phase", ["full", "local"])
def test_a_loss_that_is_no_number_says_what_to_try(phase: Any) -> None:
    quantized = quantize(program(), "w2g16-rtn-asym")
    broken = next(iter(quantized.report.weights.values()))
    broken.codes.scales[0] = float("nan")
    with pytest.raises(LearningError, match=r"the loss of step 1 is .* no number: learn more slowly \(rate=0.3\)"):
        learned(program(), quantized, inputs(4), Learning(phases=(phase,)))


def test_refusals() -> None:
    nothing = Quantized(program(), replace(made().report, weights={}, activations=(), caches=()))
    with pytest.raises(ConfigError, match="nothing of the program is rounded"):
        learned(program(), nothing, inputs(4))
    with pytest.raises(ConfigError, match="learning needs windows"):
        learned(program(), made(), inputs(4), Learning(), held_out=[])
    with pytest.raises(ConfigError, match="there is nothing to learn"):
        learned(program(), quantize(program(), "w4-rtn"), inputs(4), Learning(("zeros",)))
    for wrong in ({"kinds": ()}, {"kinds": ("a", "a")}, {"phases": ("up",)}, {"batch": 0}, {"minutes": 0}, {"rate": 0}):
        with pytest.raises(ConfigError):
            Learning(**wrong)


RANK = """
import json, sys
import torch
from spinpass.learning import Learning
from spinpass.quantization import learned, quantize
from spinpass.workers import joined_team
from tests.support.quantizable import inputs, program

with joined_team() as team, team.as_one():
    quantized = quantize(program(), "w2g16-rtn-asym-a8")
    settings = Learning(("scales", "offsets"), (sys.argv[1],), rounds=2, batch=2, rate=10)
    found = learned(program(), quantized, inputs(17), settings, team=team)
    course = found.report.learning
    sums = {name: float(t.double().square().sum()) for name, t in found.program.state_dict.items()}
    print(json.dumps([course.after, course.steps, sums]))
"""


@pytest.mark.parametrize("phase", ["full", "local"])
def test_two_ranks_learn_what_one_does(phase: Any, tmp_path: Path) -> None:
    settings = Learning(("scales", "offsets"), (phase,), rounds=2, batch=2, rate=10)
    alone = learned(program(), made("w2g16-rtn-asym-a8"), inputs(17), settings)
    course = alone.report.learning
    assert course is not None
    for ended in ranks.run_script(tmp_path, RANK, phase):
        assert ended.returncode == 0, ended.stderr
        after, steps, sums = json.loads(ended.stdout)
        assert steps == course.steps and after == pytest.approx(course.after, rel=1e-3)
        for name, tensor in numbers(alone).items():
            assert sums[name] == pytest.approx(float(tensor.double().square().sum()), rel=1e-3)


def test_there_is_a_window_for_each_rank() -> None:
    class Two(Team):
        size = 2

    with pytest.raises(ConfigError, match="2 ranks share 1 windows to a step: learn with batch=2 or more"):
        learned(program(), made(), inputs(17), Learning(), team=Two())

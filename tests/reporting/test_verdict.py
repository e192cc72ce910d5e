"""The sentence that the numbers amount to, and advice that can be typed."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import typer.main

import spinpass
from spinpass.cli import app as commands
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.reporting.report import Report, Scheme
from spinpass.reporting.verdict import advice, details_of_verdict, headline, raised_kinds, verdict
from tests.support import reports

UP = {f"blocks.{k}.mlp.up.weight": (0.01, 0.0121) for k in range(2)}
DOWN = {f"blocks.{k}.mlp.down.weight": (0.01, 0.02) for k in range(2)}  # which writes the stream


def of(**schemes: Scheme) -> Report:
    """A report of schemes, whose names have underscores for dashes."""
    return replace(reports.report(), schemes={name.replace("_", "-"): each for name, each in schemes.items()})


@cache
def offline() -> Any:
    return spinpass.plan(reports.outlying()[1], spinpass.RotationConfig(form="offline"))


def test_the_sentence_of_a_scheme() -> None:
    assert verdict(of(w4a8=reports.scheme(1.29, 1.05))) == "w4a8: 1.05 × perplexity at 92 MB; without rotation 1.29."
    noisy = of(w4a8=reports.scheme(1.051, 1.05, spread=0.05))
    assert (
        verdict(noisy) == "w4a8: 1.05 × perplexity at 92 MB; without rotation 1.05, which 3 windows do not tell apart."
    )


def test_the_sentence_is_about_the_smallest_scheme_that_is_good() -> None:
    large, small, bad = (
        reports.scheme(1.01, 1.001, size=160_000_000),
        reports.scheme(1.3, 1.09),
        reports.scheme(9, 2, size=60_000_000),
    )
    assert verdict(of(w8_rtn=large, w4_rtn=small, w2_rtn=bad)).startswith("w4-rtn: 1.09 ×")
    assert verdict(of(w2_rtn=bad, w3_rtn=reports.scheme(9, 1.5))).startswith("w3-rtn: 1.50 ×"), "none is good"
    assert headline({"a": (1.0, 5), "b": (1.05, 5)}) == "a"


def test_without_a_scheme_the_activations_are_the_verdict() -> None:
    said = verdict(of())
    assert said.startswith(
        "Rotation lowers the worst max/median of what linear layers read from 255 to 9.39; unquantized"
    )
    assert verdict(replace(of(), pairs=())).startswith(
        "Unquantized, the perplexity is 65.91 before and 65.91 after rotation."
    )


def test_what_follows_the_sentence() -> None:
    said = list(details_of_verdict(reports.deep()))
    assert said[0] == "int4: 1.04 × perplexity at 92 MB, 31 tokens per second in ONNX Runtime."
    assert "Certified: the rotated model computes the same function." in said and said[-1].endswith("FLOP per token.")
    assert any(line.startswith("Not certified") for line in details_of_verdict(replace(of(), certificate=None)))
    broken = list(details_of_verdict(replace(of(), certificate={"ok": False})))
    assert not any("ertified" in line for line in broken), "the page says it in red"


def test_offline_r1_that_raises_errors_is_advised_against() -> None:
    report = replace(of(w4_rtn_a8=reports.scheme(1.2, 1.05, errors=UP | DOWN)), plan=offline())
    first = advice(report)[0]
    assert first.options == "--form online" and "raises the error of mlp.up (×\u00a01.21): norm scales" in first.why
    assert "--form online" not in [each.options for each in advice(replace(report, plan=reports.report().plan))], (
        "online already"
    )
    both = replace(report, schemes={"w8": reports.scheme(1.2, 1.01, size=160_000_000, errors=UP), **report.schemes})
    assert "Under w4-rtn-a8, " in advice(both)[0].why, "the scheme of the verdict is told first"
    lowered = replace(of(w4_rtn_a8=reports.scheme(1.2, 1.05, errors=DOWN)), plan=offline())
    assert not advice(lowered)


def test_kinds_whose_errors_are_raised_are_named_from_the_worst() -> None:
    gate = {f"blocks.{k}.mlp.gate.weight": (0.01, 0.02) for k in range(2)}
    equal = {"head.weight": (0.0, 0.0), "tail.weight": (0.01, 0.0104)}
    scheme = reports.scheme(1, 1, errors=UP | gate | DOWN | equal)
    assert list(raised_kinds(scheme, {*UP, *gate, *equal})) == ["mlp.gate", "mlp.up"]


def test_no_gain_and_a_loss_are_told() -> None:
    assert advice(of(w4a8=reports.scheme(1.05, 1.0501, spread=0.1)))[0].options == "--windows 12"
    worse = of(w4a8=reports.scheme(1.05, 1.08))
    assert advice(worse)[0].options == "--rotations R2,R4" and "makes w4a8 worse, by 2.9 %" in advice(worse)[0].why
    assert advice(replace(worse, plan=offline()))[0].options == "--form online"


def test_one_window_tells_nothing() -> None:
    single = Comparison(Perplexity((2.0,), 11), Perplexity((2.5,), 11), 1.0, (0.0,))
    scheme = reports.scheme(1.05, 1.04)
    alone = Scheme(replace(scheme.original, comparison=single), replace(scheme.rotated, comparison=single))
    assert "do not tell" in verdict(of(w4a8=alone)) and "1 window do" in verdict(of(w4a8=alone))


def every_advice() -> list[str]:
    """One of each kind."""
    _, program = reports.outlying()
    few = spinpass.plan(program, spinpass.RotationConfig(rotations="R1,R2"))  # type: ignore[arg-type]
    made = [
        of(),
        replace(of(w4_rtn_a8=reports.scheme(1.2, 1.05, errors=UP)), plan=offline()),
        replace(of(w4a8=reports.scheme(1.2, 1.05)), plan=few),
        replace(of(kv4=reports.scheme(1.2, 1.05)), plan=few),
        of(w4a8=reports.scheme(1.05, 1.05, spread=0.1)),
        of(w4a8=reports.scheme(1.05, 1.08)),
        of(w4_rtn_a8=reports.scheme(1.5, 1.2)),
    ]
    return sorted({each.options for report in made for each in advice(report)})


def test_every_advice_can_be_typed() -> None:
    found = every_advice()
    assert found == [
        "--form online", "--rotations R1,R2,R3", "--rotations R1,R2,R4", "--rotations R2,R4", "--scheme w4-gptq-a8",
        "--scheme w4g128-rtn-a8", "--windows 12",
    ]  # fmt: skip
    command: Any = typer.main.get_command(commands.app).commands["report"]  # type: ignore[attr-defined]
    for options in found:
        command.make_context("report", ["MODEL", *shlex.split(options)], resilient_parsing=True)
        assert shlex.split(options)[0] in {name for param in command.params for name in param.opts}


@pytest.mark.parametrize("ratio", [1.2, 1.05])
def test_rounding_to_nearest_is_only_blamed_where_it_costs(ratio: float) -> None:
    options = [each.options for each in advice(of(w4_rtn_a8=reports.scheme(1.5, ratio)))]
    assert ("--scheme w4-gptq-a8" in options) == (ratio > 1.1)

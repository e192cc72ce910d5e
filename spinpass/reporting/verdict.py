"""What the numbers amount to, in a sentence, and what they advise to try, with the option to type.

A difference counts where it is more than two standard errors over windows from none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from spinpass.evaluation import Change
from spinpass.planning import PlannedSpace, layer_pattern
from spinpass.quantization import QuantizationConfig

from .activations import INPUT
from .families import joined
from .numbers import counted, or_zero, short, times
from .panels import brief
from .report import Report, Scheme
from .scatter import megabytes

_ENOUGH = 1.1  # a ratio that is good
_RAISED = 1.05  # errors that rotation makes larger by more are named
_NAMED = 3  # kinds of layers in a sentence


@dataclass(frozen=True)
class Advice:
    """What to try, and why: a sentence, then the options to type."""

    why: str
    options: str


def verdict(report: Report) -> str:
    """What rotation and rounding come to, in one sentence."""
    if not report.schemes:
        return _of_activations(report)
    name = headline_of(report)
    scheme = report.schemes[name]
    rotated, original = scheme.rotated.comparison.ratio, scheme.original.comparison.ratio
    said = f"{name}: {times(rotated)} × perplexity at {megabytes(scheme.rotated.bytes)}"
    if not told_apart(scheme.gain):
        windows = counted(len(scheme.rotated.comparison.after.losses), "window")
        return f"{said}; without rotation {times(original)}, which {windows} do not tell apart."
    return f"{said}; without rotation {times(original)}."


def details_of_verdict(report: Report) -> Iterator[str]:
    """The sentences that follow: the exported files, whether the function is the same, and what it costs."""
    for name, file in report.files.items():
        speed = f"{short(file.speed.decode)} tokens per second"
        about = f"{times(file.comparison.ratio)} × perplexity at {megabytes(file.bytes)}, {speed} in {file.runtime}"
        yield f"{name}: {about}."
    if report.schemes:
        yield _of_activations(report)
    if report.certificate is None:
        yield "Not certified: whether the rotated model computes the same function was not checked."
    elif report.certificate["ok"]:
        yield "Certified: the rotated model computes the same function."
    flops = report.plan.flops
    yield f"Online rotations add {flops:,} FLOP per token." if flops else "No rotation is computed online."


def told_apart(change: Change) -> bool:
    """Whether a change is significant; one of a single window is not."""
    return not math.isnan(change.error) and abs(change.mean) > 2 * change.error


def headline_of(report: Report) -> str:
    """The scheme that the sentence is about. There is one."""
    return headline({name: (x.rotated.comparison.ratio, x.rotated.bytes) for name, x in report.schemes.items()})


def headline(schemes: Mapping[str, tuple[float, int]]) -> str:
    """Of schemes, by name with (ratio of perplexities, bytes), the smallest that is good; where none is, the best."""
    good = [name for name, (ratio, _) in schemes.items() if ratio <= _ENOUGH]
    if good:
        return min(good, key=lambda name: (schemes[name][1], schemes[name][0]))
    return min(schemes, key=lambda name: schemes[name])


def _of_activations(report: Report) -> str:
    inputs = [p for p in report.pairs if p.kind == INPUT] or list(report.pairs)
    found = report.unquantized
    same = f"unquantized, the perplexity is {found.before.value:.2f} before and {found.after.value:.2f} after"
    if not inputs:
        return f"{same[0].upper()}{same[1:]} rotation."
    before, after = (max(or_zero(getattr(p, side).ratio) for p in inputs) for side in ("before", "after"))
    turns = "lowers" if after < before else "raises" if after > before else "keeps"
    worst = f"the worst max/median of what linear layers read from {short(before)} to {short(after)}"
    return f"Rotation {turns} {worst}; {same}."


def advice(report: Report) -> list[Advice]:
    """What the numbers give reason to try."""
    return [
        *_without_a_scheme(report),
        *_raised_errors(report),
        *_left_out(report),
        *_no_gain(report),
        *_rounding(report),
    ]


def _without_a_scheme(report: Report) -> Iterator[Advice]:
    if not report.schemes:
        yield Advice("What rotation is worth shows once something is rounded.", "--scheme w4g128-rtn-a8")


def _raised_errors(report: Report) -> Iterator[Advice]:
    """Offline, R1 folds norm scales into the weights that read the stream, which can make them harder to round."""
    folded = {reader for space in _offline_streams(report) for reader in space.readers}
    for name in sorted(report.schemes, key=lambda each: each != headline_of(report)):  # which stays in order else
        raised = raised_kinds(report.schemes[name], folded)
        if raised:
            listed = [f"{kind} (×\u00a0{times(factor)})" for kind, factor in list(raised.items())[:_NAMED]]
            more = f" and {counted(len(raised) - _NAMED, 'other kind')}" if len(raised) > _NAMED else ""
            why = f"Under {name}, offline R1 raises the error of {_listed(listed)}{more}"
            means = "norm scales are folded into them. The online form leaves the scales where they are."
            yield Advice(f"{why}: {means}", "--form online")
            return


def _offline_streams(report: Report) -> list[PlannedSpace]:
    return [space for space in report.plan.spaces if space.role == "R1" and space.form == "offline"]


def raised_kinds(scheme: Scheme, weights: Collection[str]) -> dict[str, float]:
    """Of some weights the kinds whose errors rotation raises, and by what factor on average, the most first."""
    kinds: dict[str, list[float]] = {}
    for fqn, (before, after) in scheme.errors().items():
        if fqn in weights and before > 0 and after > 0:
            kinds.setdefault(layer_pattern(joined([fqn])), []).append(math.log(after / before))
    factors = {kind: math.exp(statistics.fmean(logs)) for kind, logs in kinds.items()}
    raised = sorted((k for k in factors if factors[k] > _RAISED), key=factors.__getitem__, reverse=True)
    return {name: factors[kind] for kind, name in zip(raised, brief(raised))}


def _left_out(report: Report) -> Iterator[Advice]:
    """What a scheme rounds is not rotated because the rotation was not asked for."""
    asked = report.plan.config.rotations
    for name in report.schemes:
        rounded = QuantizationConfig.parse(name)
        for role, part, what in (
            ("R4", rounded.activations, "the inputs of the down projections"),
            ("R3", rounded.cache, "keys"),
        ):
            if part is not None and role not in asked:
                every = ",".join((*asked, role))
                yield Advice(f"{name} rounds {what}, which {role} rotates.", f"--rotations {every}")
                return


def _no_gain(report: Report) -> Iterator[Advice]:
    for name, scheme in report.schemes.items():
        gain = scheme.gain
        if not told_apart(gain):
            windows = 4 * report.windows
            yield Advice(
                f"{counted(report.windows, 'window')} do not tell whether rotation helps {name}.",
                f"--windows {windows}",
            )
        elif gain.mean > 0:
            worst = f"Rotation makes {name} worse, by {gain.percent:.1f} %."
            if _offline_streams(report):
                yield Advice(worst, "--form online")
            else:
                yield Advice(f"{worst} Leave out the rotations of the residual stream.", "--rotations R2,R4")
        else:
            continue
        return


def _rounding(report: Report) -> Iterator[Advice]:
    for name, scheme in report.schemes.items():
        ratio, better = scheme.rotated.comparison.ratio, name.replace("rtn", "gptq")
        if ratio > _ENOUGH and better != name and better not in report.schemes:
            why = f"{name} rounds to nearest, at {times(ratio)} × perplexity."
            yield Advice(f"{why} GPTQ makes up for what it rounds.", f"--scheme {better}")
            return


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]

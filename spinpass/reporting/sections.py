"""The sections of the page, each a generator of its parts; one without parts is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from spinpass.evaluation import Change, Perplexity, change
from spinpass.planning import grouped_refusals, grouped_spaces, online_parts

from .activations import Pair
from .families import families, joined, label, worst_of_each
from .markup import Html, details, table, tag
from .numbers import counted, or_zero, share, short, small, with_error
from .panels import channel_lines, channel_maps, layer_panels
from .report import Report
from .scatter import Measured, megabytes, pareto
from .statistics import SiteStatistics
from .verdict import headline_of

_SINGLE = 6  # sites whose channels are drawn
_PANELS = 12  # kinds of layers in a picture
_SIDES = ("original", "rotated")
_CALLED = {"plain": "not quantized", "before": "original", "after": "rotated", "file": "exported file"}
Number = Callable[[SiteStatistics], float]
PEAK: Number = attrgetter("peak")
RATIO: Number = attrgetter("ratio")
MEAN: Number = attrgetter("mean_ratio")
KURTOSIS: Number = attrgetter("kurtosis")


def windows_of(report: Report) -> str:
    """How much text was run."""
    return f"{counted(report.windows, 'window')} of {report.length} tokens"


# -- size, quality, speed ---------------------------------------------------------------------------------------------


def schemes_section(report: Report) -> Iterator[object]:
    """Every program and file as a point, and as a row."""
    yield pareto(list(_points(report)), _CALLED)
    yield tag(
        "p",
        f"Perplexity over {windows_of(report)}, the same for every row; ± one standard error over windows. Ratios are "
        "paired, so that their errors are far smaller than those of the perplexities. Schemes are simulated: only "
        "exported files have a speed (--file).",
        class_="quiet",
    )
    head = ("scheme", "program", "MB", "÷ unquantized", "÷ original", "perplexity", "same likeliest token",
            "KL, nats/token", "tokens/s", "prefill")  # fmt: skip
    rows = list(_rows(report))
    timed = len(head) if report.files else len(head) - 2
    yield table(head[:timed], [row[:timed] for row in rows], numbers=timed - 2)


def _points(report: Report) -> Iterator[Measured]:
    yield Measured("unquantized", "plain", report.bytes[0], 1.0)
    for name, scheme in report.schemes.items():
        for kind, side in (("before", scheme.original), ("after", scheme.rotated)):
            yield Measured(name, kind, side.bytes, side.comparison.ratio)
    for name, file in report.files.items():
        yield Measured(name, "file", file.bytes, file.comparison.ratio, file.speed.decode)


def _rows(report: Report) -> Iterator[list[object]]:
    base, rotated = report.unquantized.before, report.unquantized
    before, after = report.bytes
    yield ["unquantized", _SIDES[0], megabytes(before)[:-3], "", "", _value(base), *[""] * 4]
    yield ["unquantized", _SIDES[1], *_compared(base, rotated, after, rotated.change)]
    for name, scheme in report.schemes.items():
        for side, program, gain in ((scheme.original, _SIDES[0], None), (scheme.rotated, _SIDES[1], scheme.gain)):
            yield [name, program, *_compared(base, side.comparison, side.bytes, gain)]
    for name, file in report.files.items():
        rates = [f"{rate:,.1f}" for rate in (file.speed.decode, file.speed.prefill)]
        yield [name, file.runtime, *_compared(base, file.comparison, file.bytes, None)[:-2], *rates]


def _compared(base: Perplexity, found: Any, size: int, gain: Change | None) -> list[object]:
    relative = change(base, found.after)
    against = "" if gain is None else _ratio(gain)
    likeliest, divergence = f"{found.agreement:.2%}", f"{found.divergence:.2e}"
    return [megabytes(size)[:-3], _ratio(relative), against, _value(found.after), likeliest, divergence, "", ""]


# -- layers -----------------------------------------------------------------------------------------------------------


def layers_section(report: Report) -> Iterator[object]:
    """The error of every weight under every scheme that rounds weights."""
    schemes = {name: errors for name, scheme in report.schemes.items() if (errors := scheme.errors())}
    if not schemes:
        return
    yield tag(
        "p",
        "How much of what a layer returns is lost by rounding its weight W to Ŵ: ‖X(W − Ŵ)ᵀ‖² ÷ ‖X Wᵀ‖² on the "
        "windows to calibrate on. X is what the quantized layers before it return, rounded where the scheme rounds "
        "activations.",
        class_="quiet",
    )
    chosen = headline_of(report)
    first = chosen if chosen in schemes else next(iter(schemes))
    yield tag("h3", first)
    yield from _losses(schemes[first])
    for name in schemes:
        if name != first:
            yield details(name, *_losses(schemes[name]))


def _losses(errors: Mapping[str, tuple[float, float]]) -> Iterator[Html]:
    kinds = families((joined([fqn]), both) for fqn, both in errors.items())
    yield from _layers("relative error", kinds, None, ("original", "rotated"))
    rows = ([fqn, *map(small, both), _quotient(*both)] for fqn, both in errors.items())
    every = table(("weight", *_SIDES, "rotated ÷ original"), rows, numbers=3)
    yield details(f"All {counted(len(errors), 'weight')}", every)


def _layers(
    what: str,
    kinds: Mapping[str, list[tuple[int, float, float]]],
    lowest: float | None,
    sides: tuple[str, str] = ("before", "after"),
) -> Iterator[Html]:
    finite = {k: v for k, v in kinds.items() if any(math.isfinite(x) for entry in v for x in entry[1:])}
    most = sorted(finite, key=lambda k: max(or_zero(entry[1]) for entry in finite[k]), reverse=True)[:_PANELS]
    yield layer_panels(what, {k: finite[k] for k in finite if k in most}, lowest=lowest, sides=sides)
    left = len(finite) - len(most)
    if left:
        rest = f"{counted(left, 'kind')} of layers with smaller values: see the table."
        yield tag("p", rest, class_="quiet")


def _quotient(before: float, after: float) -> str:
    return short(after / before) if before else ""


# -- activations ------------------------------------------------------------------------------------------------------


def activations_section(report: Report) -> Iterator[object]:
    """What is rounded while the program runs: worst vectors, channels, and a table of all sites."""
    if report.pairs:
        yield from _sites(report)
    if report.unpaired:
        rows = [(u.name, u.why) for u in report.unpaired]
        yield tag("h3", "Without a partner")
        yield table(("site", "why"), rows, numbers=0)
    if report.left:
        yield tag("h3", "Not measured")
        yield table(("linear layer", "why"), report.left.items(), numbers=0)


def _sites(report: Report) -> Iterator[object]:
    yield tag(
        "p",
        "What a quantizer sees where it rounds: the inputs of the linear layers (one scale per token), keys behind the "
        "position embedding and values (one scale per head and token). max/median is that of |x| in one such vector, "
        "the worst of all; the larger it is, the fewer levels are left for the other channels. Norm scales that "
        "rotation folds into weights are gone from the inputs after it.",
        class_="quiet",
    )
    yield tag("h3", "Worst max/median of every layer")
    yield from _numbers(report, "max/median of |x|", RATIO, 1.0)
    seen = [p for p in report.pairs if p.before.vectors and p.after.vectors]
    worst = {label(pair): (pair.before, pair.after) for pair in worst_of_each(seen, _SINGLE)}
    if worst:
        yield tag("h3", "Channels of the worst layer of each kind: largest |x|")
        yield channel_lines(worst)
    kinds = families((label(p), (p.before.peaks, p.after.peaks)) for p in seen)
    most = sorted(kinds, key=lambda k: max(float(entry[1].max()) for entry in kinds[k]), reverse=True)[:_PANELS]
    maps = channel_maps({k: v for k, v in kinds.items() if k in most})
    if maps:
        yield tag("h3", "Channels of every layer: largest |x|")
        yield tag("p", "A row is a layer, a column a channel.", class_="quiet")
        yield maps
    yield details("Excess kurtosis, which is 0 for Gaussian values", *_numbers(report, "excess kurtosis", KURTOSIS))
    yield details("Largest |x|", *_numbers(report, "largest |x|", PEAK))
    yield details(f"All {counted(len(report.pairs), 'site')}", _site_table(report))


def _numbers(report: Report, what: str, get: Number, lowest: float | None = None) -> Iterator[Html]:
    return _layers(what, families((label(p), (get(p.before), get(p.after))) for p in report.pairs), lowest)


def _site_table(report: Report) -> Html:
    head = ("site", "channels", "max |x|", "after", "max/median", "after", "mean over vectors", "after",
            "excess kurtosis", "after", "largest channel", "after")  # fmt: skip
    return table(head, (_site_row(pair) for pair in report.pairs), numbers=len(head) - 1)


def _site_row(pair: Pair) -> list[object]:
    sides = (pair.before, pair.after)
    row: list[object] = [label(pair), len(pair.before.peaks)]
    for get in (PEAK, RATIO, MEAN, KURTOSIS):
        row += [short(get(side)) for side in sides]
    return row + [int(side.peaks.argmax()) if side.vectors else "–" for side in sides]


# -- plan, certificate, origin ----------------------------------------------------------------------------------------


def plan_section(report: Report) -> Iterator[object]:
    """What was rotated, what was refused and why."""
    plan = report.plan
    total = f"{counted(len(plan.spaces), 'space')}, {plan.flops:,} FLOP per token and {plan.bytes_added:,} bytes added"
    yield table(_PLAN_HEAD, _plan_rows(report, every_space=False), numbers=2, caption=total)
    notes = sorted({note for space in plan.spaces for note in space.notes})
    yield from (tag("p", note, class_="quiet") for note in notes)
    yield details("Every space", table(_PLAN_HEAD, _plan_rows(report, every_space=True), numbers=2))
    refused = [(what, why, count) for (what, why), count in grouped_refusals(plan).items()]
    if refused:
        yield tag("h3", "Refused")
        yield table(("left alone", "why", "times"), refused, numbers=1)
    settings = [(key, value) for key, value in plan.config.to_dict().items()]
    yield details("Configuration", table(("setting", "value"), settings, numbers=0))


_PLAN_HEAD = ("space", "size", "rotation", "form", "online", "FLOP/token", "bytes")


def _plan_rows(report: Report, *, every_space: bool) -> Iterator[list[object]]:
    for name, spaces in grouped_spaces(report.plan, every_space=every_space).items():
        first, name = spaces[0], f"{name} ({len(spaces)}×)" if len(spaces) > 1 else name
        sums = (sum(s.flops for s in spaces), sum(s.bytes_added for s in spaces))
        yield [name, first.size, first.rotation, first.form, online_parts(spaces), *(f"{total:,}" for total in sums)]


def certificate_section(report: Report) -> Iterator[object]:
    """Verdict, bounds and errors of every output."""
    certificate = report.certificate
    if certificate is None:
        return
    yield tag("p", certificate["verdict"], class_="good" if certificate["ok"] else "bad")
    yield tag("p", f"{certificate['constants']}; closed loop: {certificate['closed_loop']}.", class_="quiet")
    head = ("output", "shape", "", "max |ref|", "float64 error", "argmax", f"{certificate['dtype']} error", "argmax")
    yield table(head, map(_output_row, certificate["outputs"]), numbers=5)


def _output_row(output: Mapping[str, Any]) -> list[object]:
    exact, native = output["float64"], output["native"]
    verdict = tag("em", "ok" if output["ok"] else output["failure"], class_="good" if output["ok"] else "bad")
    errors = [cell for found in (exact, native) for cell in (f"{float(found['error']):.1e}", share(found["argmax"]))]
    size = "×".join(map(str, output["shape"]))
    return [output["name"], size, verdict, f"{float(exact['scale']):.3g}", *errors]


def origin_section(report: Report) -> Iterator[object]:
    """Date, command, seed, versions, and the time of every step."""
    origin = report.origin
    rows: list[tuple[str, object]] = [("date", origin.date), ("model", report.model)]
    rows += [("command", tag("code", origin.command))] if origin.command else []
    rows += [("seed", report.plan.config.seed), ("text", f"{windows_of(report)}, {origin.text}")]
    yield table(("what", "value"), [*rows, ("threads of PyTorch", origin.threads), *origin.versions.items()], numbers=0)
    yield details(
        "Seconds of every step",
        table(("step", "seconds"), [(name, f"{time:.1f}") for name, time in report.seconds.items()], numbers=1),
    )


# -- numbers ----------------------------------------------------------------------------------------------------------


def _value(found: Perplexity) -> str:
    return with_error(found.value, found.error, 3)


def _ratio(found: Change) -> str:
    return with_error(math.exp(found.mean), math.exp(found.mean) * found.error, 4)

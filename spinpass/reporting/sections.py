"""The sections of the page, each a generator of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from spinpass.evaluation import Change, Perplexity, change
from spinpass.planning import grouped_refusals, grouped_spaces, online_parts

from .activations import INPUT, Pair
from .families import families, joined, label, worst_of_each
from .markup import Html, arrow, details, figure, html, table, tag
from .numbers import counted, or_zero, share, short, small, with_error
from .pictures import bars, heatmaps, surfaces
from .report import Report
from .statistics import SiteStatistics

_SURFACES = 6  # pictures of single sites
_PANELS = 12  # kinds of layers in a picture of bars
_SIDES = ("original", "rotated")
Number = Callable[[SiteStatistics], float]
PEAK: Number = attrgetter("peak")
RATIO: Number = attrgetter("ratio")
MEAN: Number = attrgetter("mean_ratio")
KURTOSIS: Number = attrgetter("kurtosis")


def windows_of(report: Report) -> str:
    """How much text was run."""
    return f"{counted(report.windows, 'window')} of {report.length} tokens"


# -- activations ------------------------------------------------------------------------------------------------------


def activations_section(report: Report) -> Iterator[object]:
    """Bars and heatmaps of every layer, a table of all sites, and what is not among them."""
    yield tag(
        "p",
        "What a quantizer sees where it rounds: the inputs of the linear layers (one scale per token), keys behind the "
        "position embedding and values (one scale per head and token). max/median is that of |x| in one such vector, "
        "the worst of all; the larger it is, the fewer levels are left for the other channels. Excess kurtosis is 0 "
        "for Gaussian values. Norm scales that rotation folds into weights are gone from the inputs after it.",
    )
    for name, get, lowest in (("max/median of |x|", RATIO, 1.0), ("excess kurtosis", KURTOSIS, None),
                              ("max |x|", PEAK, None)):  # fmt: skip
        yield from _bars(name, families((label(p), (get(p.before), get(p.after))) for p in report.pairs), lowest)
    yield from _heatmaps(report)
    yield from _unmeasured(report)
    yield details(f"All {len(report.pairs)} sites", _site_table(report))


def _bars(name: str, panels: Mapping[str, list[tuple[int, float, float]]], lowest: float | None) -> Iterator[Html]:
    finite = {k: v for k, v in panels.items() if any(math.isfinite(x) for entry in v for x in entry[1:])}
    most = sorted(finite, key=lambda k: max(or_zero(entry[1]) for entry in finite[k]), reverse=True)[:_PANELS]
    shown = {k: finite[k] for k in finite if k in most}
    if shown:
        left = len(finite) - len(shown)
        rest = f" {counted(left, 'kind')} of layers with smaller values: see the table." if left else ""
        caption = f"{name} of every layer, before and after rotation.{rest}"
        yield figure(bars(name, shown, lowest=lowest), caption)


def _heatmaps(report: Report) -> Iterator[Html]:
    seen = (p for p in report.pairs if p.before.vectors and p.after.vectors)
    panels = families((label(p), (p.before.peaks, p.after.peaks)) for p in seen)
    most = sorted(panels, key=lambda k: max(float(entry[1].max()) for entry in panels[k]), reverse=True)[:_PANELS]
    if panels:
        caption = "max |x| of every channel (columns) of every layer (rows), before and after rotation."
        yield figure(heatmaps({k: v for k, v in panels.items() if k in most}), caption)


def _unmeasured(report: Report) -> Iterator[Html]:
    if report.unpaired:
        rows = [(u.name, u.why) for u in report.unpaired]
        yield tag("h3", "Without a partner")
        yield table(("site", "why"), rows, numbers=0)
    if report.left:
        yield tag("h3", "Not measured")
        yield table(("linear layer", "why"), report.left.items(), numbers=0)


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


def sites_section(report: Report) -> Iterator[object]:
    """Surfaces of the worst site of every kind of layer."""
    yield tag(
        "p",
        "|x| over channels and vectors of the first window, on one scale before and after; each bin shows the largest "
        "value in it. Of every kind of layer, the one with the worst max/median before rotation.",
    )
    for pair in worst_of_each(report.pairs, _SURFACES):
        axis = "token" if pair.kind == INPUT else "vector"
        yield tag("h3", label(pair))
        yield figure(surfaces(label(pair), pair.before, pair.after, axis), _numbers(pair))


def _numbers(pair: Pair) -> Html:
    named = (("max |x|", PEAK), ("max/median", RATIO), ("mean of it", MEAN), ("excess kurtosis", KURTOSIS))
    changes = (Html(f"{html(name)} {arrow(short(get(pair.before)), short(get(pair.after)))}") for name, get in named)
    counted = html(f"All windows, {pair.before.vectors:,} vectors of {len(pair.before.peaks)} channels: ")
    return Html(counted + "; ".join(changes))


# -- quantization -----------------------------------------------------------------------------------------------------


def perplexity_section(report: Report) -> Iterator[object]:
    """Every program, compared with the original unquantized one, and with the original under its scheme."""
    yield tag(
        "p",
        f"{windows_of(report)}, the same for every row; ± one standard error over windows. Ratios are paired, so "
        "that their errors are far smaller than those of the perplexities. Quantization is simulated.",
    )
    head = ("scheme", "program", "perplexity", "÷ unquantized", "÷ original", "same likeliest token", "KL, nats/token")
    yield table(head, _perplexity_rows(report), numbers=5)


def _perplexity_rows(report: Report) -> Iterator[list[object]]:
    base, rotated = report.unquantized.before, report.unquantized
    yield ["unquantized", _SIDES[0], _value(base), "", "", "", ""]
    yield ["unquantized", _SIDES[1], *_compared(base, rotated, rotated.change)]
    for name, scheme in report.schemes.items():
        yield [name, _SIDES[0], *_compared(base, scheme.original.comparison, None)]
        yield [name, _SIDES[1], *_compared(base, scheme.rotated.comparison, scheme.gain)]


def _compared(base: Perplexity, found: Any, gain: Change | None) -> list[object]:
    relative = change(base, found.after)
    against = "" if gain is None else _ratio(gain)
    return [_value(found.after), _ratio(relative), against, f"{found.agreement:.2%}", f"{found.divergence:.2e}"]


def quantization_section(report: Report) -> Iterator[object]:
    """The error of every weight under every scheme."""
    if not report.schemes:
        yield tag("p", "No scheme was asked for (--scheme).")
        return
    yield tag(
        "p",
        "‖X(W − Ŵ)ᵀ‖² ÷ ‖X Wᵀ‖² of every weight W on the windows to calibrate on. X is what the quantized layers "
        "before it return, rounded where the scheme rounds activations.",
    )
    for name, scheme in report.schemes.items():
        errors = scheme.errors()
        yield tag("h3", name)
        panels = families((joined([fqn]), both) for fqn, both in errors.items())
        yield from _bars("relative error", panels, None)
        rows = ([fqn, *map(small, both), _quotient(*both)] for fqn, both in errors.items())
        yield details(f"All {len(errors)} weights", table(("weight", *_SIDES, "rotated ÷ original"), rows, numbers=3))


def _quotient(before: float, after: float) -> str:
    return short(after / before) if before else ""


# -- plan, certificate, cost ------------------------------------------------------------------------------------------


def plan_section(report: Report) -> Iterator[object]:
    """What was rotated, what was refused and why."""
    plan = report.plan
    total = f"{counted(len(plan.spaces), 'space')}, {plan.flops:,} FLOP per token and {plan.bytes_added:,} bytes added"
    yield table(_PLAN_HEAD, _plan_rows(report, every_space=False), numbers=2, caption=total)
    notes = sorted({note for space in plan.spaces for note in space.notes})
    yield from (tag("p", note, class_="quiet") for note in notes)
    yield details("Every space", table(_PLAN_HEAD, _plan_rows(report, every_space=True), numbers=2))
    yield tag("h3", "Refused")
    refused = [(what, why, count) for (what, why), count in grouped_refusals(plan).items()]
    yield table(("left alone", "why", "times"), refused, numbers=1) if refused else tag("p", "Nothing was refused.")
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
        yield tag("p", "Not certified: switched off.")
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


def cost_section(report: Report) -> Iterator[object]:
    """Bytes, tokens per second, and the time of every step."""
    plain = zip(_SIDES, report.bytes, report.rates)
    sizes = [("unquantized", name, f"{size:,}", f"{rate:,.0f}") for name, size, rate in plain]
    for scheme, found in report.schemes.items():
        sizes += [(scheme, name, f"{side.bytes:,}", "") for name, side in zip(_SIDES, (found.original, found.rotated))]
    yield table(("scheme", "program", "bytes of constants", "tokens per second"), sizes, numbers=2)
    yield tag(
        "p",
        f"Tokens per second: {windows_of(report)} through the exported graph, node by node in PyTorch, in "
        "turns; the median. Quantized programs are simulated: their speed would say nothing.",
        class_="quiet",
    )
    yield table(("step", "seconds"), [(name, f"{time:.1f}") for name, time in report.seconds.items()], numbers=1)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _value(found: Perplexity) -> str:
    return with_error(found.value, found.error, 3)


def _ratio(found: Change) -> str:
    return with_error(math.exp(found.mean), math.exp(found.mean) * found.error, 4)

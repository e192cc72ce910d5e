"""The report as one HTML page: no script, nothing fetched (its content security policy says so), light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..console import grouped_refusals, grouped_spaces, online_parts
from ..evaluation import Change, Perplexity, change
from ..exporters.files import staged
from .activations import INPUT, Pair
from .families import families, joined, label, worst_of_each
from .markup import Html, details, figure, html, section, table, tag
from .pictures import bars, short, surfaces
from .report import Report
from .statistics import Statistics

_SURFACES = 6  # pictures of single sites
_PANELS = 12  # kinds of layers in a picture of bars
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SIDES = ("untouched", "rotated")
Progress = Callable[[int, int], None]
Number = Callable[[Statistics], float]
_PEAK: Number = attrgetter("peak")
_RATIO: Number = attrgetter("ratio")
_MEAN: Number = attrgetter("mean_ratio")
_KURTOSIS: Number = attrgetter("kurtosis")


def write(report: Report, path: Path, progress: Progress | None = None) -> None:
    """Draw the page and put it at ``path``, whole or not at all. ExportError where it cannot be written."""
    text = render(report, progress)
    with staged(path.parent, len(text.encode())) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def render(report: Report, progress: Progress | None = None) -> str:
    """The whole document. ``progress``: sections done, and all."""
    sections: dict[str, tuple[str, Callable[[Report], Iterator[object]]]] = {
        "activations": ("Activations", _activations),
        "sites": ("Single sites", _sites),
        "perplexity": ("Perplexity", _perplexity),
        "quantization": ("Quantization error", _quantization),
        "plan": ("Plan", _plan),
        "certificate": ("Certificate", _certificate),
        "cost": ("Sizes and speeds", _cost),
    }
    made = []
    for done, (identifier, (title, write_section)) in enumerate(sections.items()):
        made.append(section(identifier, title, *write_section(report)))
        if progress is not None:
            progress(done + 1, len(sections))
    contents = (tag("a", title, href=f"#{identifier}") for identifier, (title, _) in sections.items())
    body = tag("body", _header(report), tag("nav", *contents), _tiles(report), tag("main", *made), _footer(report))
    return f'<!DOCTYPE html>\n<html lang="en">{_head(report)}{body}</html>\n'


def _head(report: Report) -> Html:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    policy = Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">')
    about = Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">')
    return tag("head", about, policy, tag("title", _title(report)), tag("style", Html(style)))


def _header(report: Report) -> Html:
    config = report.plan.config
    rotations = f"{', '.join(config.rotations)}; {config.kind}, R1 {config.form}"
    about = tag("p", f"{rotations}. {_where(report)}.", class_="quiet")
    return tag("header", tag("h1", _title(report)), about)


def _title(report: Report) -> str:
    path = Path(report.model)
    return f"Rotation of {path.resolve().name if path.exists() else report.model}"


def _where(report: Report) -> str:
    return f"{_counted(report.windows, 'window')} of {report.length} tokens"


def _footer(report: Report) -> Html:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return tag("footer", tag("p", versions, class_="quiet"))


# -- what matters most ------------------------------------------------------------------------------------------------


def _tiles(report: Report) -> Html:
    inputs = [p for p in report.pairs if p.kind == INPUT]
    caches = [p for p in report.pairs if p.kind != INPUT]
    made = []
    for what, pairs, get in (
        ("worst max/median of |x|, inputs of linear layers", inputs, _RATIO),
        ("worst max/median of |x|, keys and values", caches, _RATIO),
        ("worst excess kurtosis, inputs of linear layers", inputs, _KURTOSIS),
    ):
        if pairs:
            before = max(pairs, key=lambda p: _number(get(p.before)))
            after = max(pairs, key=lambda p: _number(get(p.after)))
            where = f"{_place(before)} → {_place(after)}" if before is not after else _place(before)
            made.append(_tile(_arrow(short(get(before.before)), short(get(after.after))), what, where))
    made.append(
        _tile(_arrow(*(_digits(p) for p in (report.unquantized.before, report.unquantized.after))), "perplexity")
    )
    for scheme, found in report.schemes.items():
        both = (found.untouched.comparison.after, found.rotated.comparison.after)
        made.append(_tile(_arrow(*map(_digits, both)), f"perplexity, {scheme}"))
    made.append(_tile(f"{report.plan.flops:,}", "FLOP per token added by online rotations"))
    made.append(_tile(_verdict(report), "certificate"))
    return tag("div", *made, class_="tiles")


def _tile(value: object, what: str, where: str = "") -> Html:
    lines = [tag("span", line) for line in (what, where) if line]
    return tag("div", tag("b", value), *lines, class_="tile")


def _place(pair: Pair) -> str:
    return joined(pair.weights) if pair.kind == INPUT else f"{pair.kind}, {joined(pair.weights)}"


def _arrow(before: str, after: str) -> Html:
    return Html(f"{tag('em', before, class_='before')} → {tag('em', after, class_='after')}")


def _verdict(report: Report) -> Html:
    if report.certificate is None:
        return html("not certified")
    ok = bool(report.certificate["ok"])
    return tag("em", "same function" if ok else "NOT the same function", class_="good" if ok else "bad")


def _digits(found: Perplexity) -> str:
    return f"{found.value:.3f}"


# -- activations ------------------------------------------------------------------------------------------------------


def _activations(report: Report) -> Iterator[object]:
    yield tag(
        "p",
        "What a quantizer sees where it rounds: the inputs of the linear layers (one scale per token), keys behind the "
        "position embedding and values (one scale per head and token). max/median is that of |x| in one such vector, "
        "the worst of all; the larger it is, the fewer levels are left for the other channels. Excess kurtosis is 0 "
        "for Gaussian values. Norm scales that rotation folds into weights are gone from the inputs after it.",
    )
    for name, get, lowest in (("max/median of |x|", _RATIO, 1.0), ("excess kurtosis", _KURTOSIS, None),
                              ("max |x|", _PEAK, None)):  # fmt: skip
        yield from _bars(name, families((label(p), (get(p.before), get(p.after))) for p in report.pairs), lowest)
    yield from _unmeasured(report)
    yield details(f"All {len(report.pairs)} sites", _site_table(report))


def _bars(name: str, panels: Mapping[str, list[tuple[int, float, float]]], lowest: float | None) -> Iterator[Html]:
    finite = {k: v for k, v in panels.items() if any(math.isfinite(x) for entry in v for x in entry[1:])}
    most = sorted(finite, key=lambda k: max(_number(entry[1]) for entry in finite[k]), reverse=True)[:_PANELS]
    shown = {k: finite[k] for k in finite if k in most}
    if shown:
        left = len(finite) - len(shown)
        rest = f" {_counted(left, 'kind')} of layers with smaller values: see the table." if left else ""
        caption = f"{name} of every layer, before and after rotation.{rest}"
        yield figure(bars(name, shown, lowest=lowest), caption)


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
    for get in (_PEAK, _RATIO, _MEAN, _KURTOSIS):
        row += [short(get(side)) for side in sides]
    return row + [int(side.peaks.argmax()) if side.vectors else "–" for side in sides]


def _sites(report: Report) -> Iterator[object]:
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
    named = (("max |x|", _PEAK), ("max/median", _RATIO), ("mean of it", _MEAN), ("excess kurtosis", _KURTOSIS))
    changes = (Html(f"{html(name)} {_arrow(short(get(pair.before)), short(get(pair.after)))}") for name, get in named)
    counted = html(f"All windows, {pair.before.vectors:,} vectors of {len(pair.before.peaks)} channels: ")
    return Html(counted + "; ".join(changes))


# -- quantization -----------------------------------------------------------------------------------------------------


def _perplexity(report: Report) -> Iterator[object]:
    yield tag(
        "p",
        f"{_where(report)}, the same for every row; ± one standard error over windows. Ratios are paired by window, so "
        "that their errors are far smaller than those of the perplexities. Quantization is simulated in the graph.",
    )
    head = ("scheme", "program", "perplexity", "÷ unquantized", "÷ untouched", "same likeliest token", "KL, nats/token")
    yield table(head, _perplexity_rows(report), numbers=5)


def _perplexity_rows(report: Report) -> Iterator[list[object]]:
    base, rotated = report.unquantized.before, report.unquantized
    yield ["unquantized", _SIDES[0], _value(base), "", "", "", ""]
    yield ["unquantized", _SIDES[1], *_compared(base, rotated, rotated.change)]
    for name, scheme in report.schemes.items():
        yield [name, _SIDES[0], *_compared(base, scheme.untouched.comparison, None)]
        yield [name, _SIDES[1], *_compared(base, scheme.rotated.comparison, scheme.gain)]


def _compared(base: Perplexity, found: Any, gain: Change | None) -> list[object]:
    relative = change(base, found.after)
    against = "" if gain is None else _ratio(gain)
    return [_value(found.after), _ratio(relative), against, f"{found.agreement:.2%}", f"{found.divergence:.2e}"]


def _quantization(report: Report) -> Iterator[object]:
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
        rows = ([fqn, *map(_small, both), _quotient(*both)] for fqn, both in errors.items())
        yield details(f"All {len(errors)} weights", table(("weight", *_SIDES, "rotated ÷ untouched"), rows, numbers=3))


def _quotient(before: float, after: float) -> str:
    return short(after / before) if before else ""


# -- plan, certificate, cost ------------------------------------------------------------------------------------------


def _plan(report: Report) -> Iterator[object]:
    plan = report.plan
    total = f"{_counted(len(plan.spaces), 'space')}, {plan.flops:,} FLOP per token and {plan.bytes_added:,} bytes added"
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


def _certificate(report: Report) -> Iterator[object]:
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
    errors = [cell for found in (exact, native) for cell in (f"{float(found['error']):.1e}", _share(found["argmax"]))]
    size = "×".join(map(str, output["shape"]))
    return [output["name"], size, verdict, f"{float(exact['scale']):.3g}", *errors]


def _cost(report: Report) -> Iterator[object]:
    plain = zip(_SIDES, report.bytes, report.rates)
    sizes = [("unquantized", name, f"{size:,}", f"{rate:,.0f}") for name, size, rate in plain]
    for scheme, found in report.schemes.items():
        sizes += [(scheme, name, f"{side.bytes:,}", "") for name, side in zip(_SIDES, (found.untouched, found.rotated))]
    yield table(("scheme", "program", "bytes of constants", "tokens per second"), sizes, numbers=2)
    yield tag(
        "p",
        f"Tokens per second: {_where(report)} through the exported graph, node by node in PyTorch, both programs in "
        "turns; the median. Quantized programs are simulated: their speed would say nothing.",
        class_="quiet",
    )
    yield table(("step", "seconds"), [(name, f"{time:.1f}") for name, time in report.seconds.items()], numbers=1)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _value(found: Perplexity) -> str:
    return _with_error(found.value, found.error, 3)


def _ratio(found: Change) -> str:
    return _with_error(math.exp(found.mean), math.exp(found.mean) * found.error, 4)


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def _small(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2e}"


def _share(agreement: float | None) -> str:
    return "" if agreement is None else f"{agreement:.1%}"


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"

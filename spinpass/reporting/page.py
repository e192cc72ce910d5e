"""The report as one HTML page: no script, nothing fetched (its content security policy says so), light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from spinpass.evaluation import Perplexity
from spinpass.formats import staged
from spinpass.progress import Progress

from . import sections
from .activations import INPUT, Pair
from .families import joined
from .markup import Html, arrow, html, section, tag
from .numbers import or_zero, short
from .report import Report
from .sections import KURTOSIS, RATIO, windows_of

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SECTIONS: dict[str, tuple[str, Callable[[Report], Iterator[object]]]] = {
    "activations": ("Activations", sections.activations_section),
    "sites": ("Single sites", sections.sites_section),
    "perplexity": ("Perplexity", sections.perplexity_section),
    "quantization": ("Quantization error", sections.quantization_section),
    "plan": ("Plan", sections.plan_section),
    "certificate": ("Certificate", sections.certificate_section),
    "cost": ("Sizes and speeds", sections.cost_section),
}


def write_page(report: Report, path: Path, progress: Progress | None = None) -> None:
    """Draw the page and put it at ``path``, whole or not at all. Raises ExportError where it cannot be written."""
    text = render(report, progress)
    with staged(path.parent, len(text.encode())) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def render(report: Report, progress: Progress | None = None) -> str:
    """The whole document as text. ``progress`` is called with the sections that are done, and all."""
    made = []
    for done, (identifier, (title, write_section)) in enumerate(_SECTIONS.items()):
        made.append(section(identifier, title, *write_section(report)))
        if progress is not None:
            progress(done + 1, len(_SECTIONS))
    contents = (tag("a", title, href=f"#{identifier}") for identifier, (title, _) in _SECTIONS.items())
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
    about = tag("p", f"{rotations}. {windows_of(report)}.", class_="quiet")
    return tag("header", tag("h1", _title(report)), about)


def _title(report: Report) -> str:
    path = Path(report.model)
    return f"Rotation of {path.resolve().name if path.exists() else report.model}"


def _footer(report: Report) -> Html:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return tag("footer", tag("p", versions, class_="quiet"))


# -- what matters most ------------------------------------------------------------------------------------------------


def _tiles(report: Report) -> Html:
    inputs = [p for p in report.pairs if p.kind == INPUT]
    caches = [p for p in report.pairs if p.kind != INPUT]
    made = []
    for what, pairs, get in (
        ("worst max/median of |x|, inputs of linear layers", inputs, RATIO),
        ("worst max/median of |x|, keys and values", caches, RATIO),
        ("worst excess kurtosis, inputs of linear layers", inputs, KURTOSIS),
    ):
        if pairs:
            before = max(pairs, key=lambda p: or_zero(get(p.before)))
            after = max(pairs, key=lambda p: or_zero(get(p.after)))
            where = f"{_place(before)} → {_place(after)}" if before is not after else _place(before)
            made.append(_tile(arrow(short(get(before.before)), short(get(after.after))), what, where))
    made.append(
        _tile(arrow(*(_digits(p) for p in (report.unquantized.before, report.unquantized.after))), "perplexity")
    )
    for scheme, found in report.schemes.items():
        both = (found.original.comparison.after, found.rotated.comparison.after)
        made.append(_tile(arrow(*map(_digits, both)), f"perplexity, {scheme}"))
    made.append(_tile(f"{report.plan.flops:,}", "FLOP per token added by online rotations"))
    made.append(_tile(_verdict(report), "certificate"))
    return tag("div", *made, class_="tiles")


def _tile(value: object, what: str, where: str = "") -> Html:
    lines = [tag("span", line) for line in (what, where) if line]
    return tag("div", tag("b", value), *lines, class_="tile")


def _place(pair: Pair) -> str:
    return joined(pair.weights) if pair.kind == INPUT else f"{pair.kind}, {joined(pair.weights)}"


def _verdict(report: Report) -> Html:
    if report.certificate is None:
        return html("not certified")
    ok = bool(report.certificate["ok"])
    return tag("em", "same function" if ok else "NOT the same function", class_="good" if ok else "bad")


def _digits(found: Perplexity) -> str:
    return f"{found.value:.3f}"

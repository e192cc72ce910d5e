"""The report as one HTML page: no script, nothing fetched (its content security policy says so), light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spinpass.formats import staged
from spinpass.progress import Progress

from . import sections
from .markup import Html, section, tag
from .report import Report
from .sections import windows_of
from .verdict import advice, details_of_verdict, verdict

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SECTIONS: dict[str, tuple[str, Callable[[Report], Iterator[object]]]] = {
    "schemes": ("Size, quality, speed", sections.schemes_section),
    "layers": ("Loss per layer", sections.layers_section),
    "activations": ("Activations", sections.activations_section),
    "plan": ("Plan", sections.plan_section),
    "certificate": ("Certificate", sections.certificate_section),
    "origin": ("How it was measured", sections.origin_section),
}


def write_page(report: Report, path: Path, progress: Progress | None = None) -> None:
    """Draw the page and put it at ``path``, whole or not at all. Raises ExportError where it cannot be written."""
    put(render(report, progress), path)


def save_report(report: Report, path: Path) -> None:
    """Keep the numbers as JSON at ``path``, whole or not at all. Raises ExportError where it cannot be written."""
    put(json.dumps(report.to_dict(), indent=1) + "\n", path)


def put(text: str, path: Path) -> None:
    """Write a text, whole or not at all. Raises ExportError where it cannot be written."""
    with staged(path.parent, len(text.encode())) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def render(report: Report, progress: Progress | None = None) -> str:
    """The whole document as text. ``progress`` is called with the sections that are done, and all."""
    made = []
    for done, (identifier, (title, write_section)) in enumerate(_SECTIONS.items(), 1):
        parts = [part for part in write_section(report) if part]
        if parts:
            made.append((identifier, title, parts))
        if progress is not None:
            progress(done, len(_SECTIONS))
    return document(_title(report), _header(report), made)


def document(title: str, header: Html, parts: Sequence[tuple[str, str, Sequence[object]]]) -> str:
    """A page of a header and sections, each an identifier, a title and what is in it."""
    contents = (tag("a", name, href=f"#{identifier}") for identifier, name, _ in parts)
    main = tag("main", *(section(identifier, name, *inside) for identifier, name, inside in parts))
    return f'<!DOCTYPE html>\n<html lang="en">{_head(title)}{tag("body", header, tag("nav", *contents), main)}</html>\n'


def _head(title: str) -> Html:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    policy = Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">')
    about = Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">')
    return tag("head", about, policy, tag("title", title), tag("style", Html(style)))


def _header(report: Report) -> Html:
    config = report.plan.config
    rotations = f"{', '.join(config.rotations)}; {config.kind}, R1 {config.form}; {windows_of(report)}"
    failed = report.certificate is not None and not report.certificate["ok"]
    return tag(
        "header",
        tag("h1", verdict(report)),
        tag("p", tag("strong", _title(report)), f" · {report.origin.date[:10]} · {rotations}", class_="quiet"),
        *([tag("p", "NOT the same function: see the certificate.", class_="bad")] if failed else []),
        *(tag("p", line) for line in details_of_verdict(report)),
        *_advice(report),
    )


def _advice(report: Report) -> Iterator[Html]:
    found = [tag("li", each.why, " Try ", tag("code", each.options), ".") for each in advice(report)]
    if found:
        yield tag("aside", tag("h2", "Worth trying"), tag("ul", *found))


def _title(report: Report) -> str:
    path = Path(report.model)
    return f"Rotation of {path.resolve().name if path.exists() else report.model}"

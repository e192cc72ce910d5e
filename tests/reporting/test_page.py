"""The page: well-formed, self-contained, verdict first, nothing that names say is taken for markup, no empty section."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import spinpass
from spinpass.errors import ExportError
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.reporting import page
from spinpass.reporting.activations import INPUT, Name, Pair, Unpaired
from spinpass.reporting.families import label
from spinpass.reporting.numbers import short
from tests.support import reports

_EMPTY = {"meta"}
_NASTY = '<script>alert("x")</script>&$\\frac{a}$'


class Document(HTMLParser):
    """Text, attributes of every tag, and whether all tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@cache
def rendered() -> str:
    return page.render(reports.report())


def bare(**changes: Any) -> Any:
    """A report without figures to draw."""
    return replace(reports.report(), **{"pairs": (), "schemes": {}} | changes)


def test_the_page_is_well_formed_and_stands_alone() -> None:
    document = Document(rendered())
    assert not document.all("script") and not document.all("link") and not document.all("iframe")
    for _, attributes in document.tags:
        for key in ("src", "srcset", "href"):
            assert (attributes.get(key) or "#").startswith(("data:image/png;base64,", "#"))
    assert "url(" not in rendered() and "@import" not in rendered()
    policy = next(a for a in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    targets = {a["id"] for _, a in document.tags if "id" in a}
    assert {str(a["href"])[1:] for a in document.all("a")} == targets and len(targets) == 6


def test_the_verdict_comes_first() -> None:
    text = page.render(reports.deep())
    said = "w4g32-asym-gptq-a8-distill: 1.04 × perplexity at 101 MB; without rotation 1.05."
    body = text[text.index("<body>") :]
    assert body.startswith(f"<body><header><h1>{said}</h1>")
    assert re.findall("<h2>(.*?)</h2>", body.split("<main>")[1])[:3] == ["Size, quality, speed", "Loss per layer", "Activations"]


def test_every_figure_has_words_and_numbers_to_point_at() -> None:
    document = Document(page.render(reports.deep()))
    figures = document.all("svg")
    assert len(figures) > 30 and all(str(a["role"]) == "img" and len(str(a["aria-label"])) > 8 for a in figures)
    assert len(document.all("title")) > 300
    for name in ("w4-rtn-a8, original: 1.90 × perplexity, 92 MB", "layer 11: original 0.07, rotated 0.048"):
        assert name in document.text


def test_no_section_is_empty() -> None:
    unmeasured = bare(pairs=(), files={}, certificate=None)
    for report in (reports.report(), reports.deep(), unmeasured):
        text = page.render(report)
        for section in re.findall("<section.*?</section>", text, re.S):
            assert re.sub("<h2>.*?</h2>|<.*?>", "", section, flags=re.S).strip(), section
        assert all(svg.count("<") > 3 for svg in re.findall("<svg.*?</svg>", text, re.S))
    assert "Loss per layer" not in text and "Activations" not in text and "<svg" not in text


def test_where_it_came_from_is_on_the_page() -> None:
    report = reports.report()
    text = Document(rendered()).text
    assert report.origin.date in text and report.origin.command in text and report.origin.text in text
    assert "seed0" in text and "spinpasstest" in text
    without = replace(report, origin=replace(report.origin, command=""))
    assert "command" not in page.render(without).split('id="origin"')[1]


def test_advice_names_what_to_type() -> None:
    text = page.render(bare())
    assert "<aside>" in text and "<code>--scheme w4g128-rtn-a8</code>" in text
    assert "<aside>" not in page.render(replace(reports.deep(), schemes={"w8": reports.scheme(1.02, 1.001)}))


def test_what_the_page_says_is_what_was_measured() -> None:
    text, report = Document(rendered()).text, reports.report()
    assert f"{report.unquantized.before.value:.3f} ± {report.unquantized.before.error:.3f}" in text
    gain = report.schemes[reports.SCHEME].gain
    assert f"{math.exp(gain.mean):.4f} ± {math.exp(gain.mean) * gain.error:.4f}" in text
    worst = max((p for p in report.pairs if p.kind == INPUT), key=lambda p: p.before.ratio)
    assert short(worst.before.ratio) in text and label(worst) in text
    assert report.certificate is not None and report.certificate["verdict"] in text
    assert f"{report.plan.flops:,} FLOP per token" in text and f"{report.bytes[1] / 1e6:.3g}" in text
    for name, errors in report.schemes[reports.SCHEME].errors().items():
        assert name in text and f"{errors[0]:.2e}" in text and f"{errors[1]:.2e}" in text


def test_names_are_text_and_never_markup() -> None:
    pair = reports.report().pairs[0]
    nasty = Pair((Name(INPUT, f"layers.0.{_NASTY}.weight"),), pair.before, pair.after)
    odd = replace(
        reports.report(),
        model=_NASTY,
        pairs=(nasty,),
        unpaired=(Unpaired(Name(INPUT, _NASTY), _NASTY),),
        left={_NASTY: _NASTY},
        files={_NASTY: reports.deep().files["int4"]},
        origin=replace(reports.report().origin, command=_NASTY, versions={_NASTY: _NASTY}),
        seconds={_NASTY: 1.0},
    )
    document = Document(page.render(odd))
    assert not document.all("script") and document.text.count(_NASTY) >= 10
    assert any(_NASTY in str(a["aria-label"]) for a in document.all("svg"))


def test_what_could_not_be_compared_is_on_the_page() -> None:
    why = "the rotated program has no such site"
    gone = Unpaired(Name("key", "blocks.0.attn.k.weight"), why)
    text = Document(page.render(bare(unpaired=(gone,), left={"matmul_7": "computed"}))).text
    assert "Without a partner" in text and "key of blocks.0.attn.k.weight" in text and why in text
    assert "Not measured" in text and "matmul_7" in text
    assert "Without a partner" not in Document(page.render(bare())).text


def test_refusals_and_a_missing_certificate_are_said() -> None:
    _, program = reports.outlying()
    plan = spinpass.plan(program, spinpass.RotationConfig(exclude=("R4:*",)))
    text = Document(page.render(bare(plan=plan, certificate=None))).text
    assert "excluded by 'R4:*'" in text and "Not certified: whether" in text and "Certificate" not in text
    assert "Refused" not in Document(page.render(bare(plan=replace(plan, refusals=())))).text


def test_a_failed_certificate_is_red() -> None:
    certificate = dict(reports.report().certificate or {}) | {"ok": False, "verdict": "NOT equivalent: logits"}
    text = page.render(bare(certificate=certificate))
    assert '<p class="bad">NOT the same function: see the certificate.</p>' in text and '<p class="bad">NOT equivalent: logits</p>' in text


def test_one_window_has_no_standard_error() -> None:
    single = Perplexity((2.0,), 11)
    text = Document(page.render(bare(windows=1, unquantized=Comparison(single, single, 1.0, (0.0,))))).text
    assert "7.389" in text and text.count("±") == 1, "in what explains the table"
    assert "1 window of" in text and "nan" not in text


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the report of yesterday")
    ticks: list[tuple[int, int]] = []
    page.write_page(bare(), path, lambda *at: ticks.append(at))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and ticks[-1] == (6, 6)
    written = path.read_text(encoding="utf-8")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExportError, match="the disk is full"):
        page.write_page(bare(), path)
    assert path.read_text(encoding="utf-8") == written and [p.name for p in tmp_path.iterdir()] == ["report.html"]

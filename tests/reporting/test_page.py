"""The page: well-formed, self-contained, nothing that names say is taken for markup, every picture decodes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import spinpass
from spinpass.errors import ExportError
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.reporting import page
from spinpass.reporting.activations import INPUT, Name, Pair, Unpaired
from spinpass.reporting.families import label
from spinpass.reporting.numbers import short
from tests.support import reports
from tests.support.pictures import check_picture

_EMPTY = {"meta", "img", "source"}
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
    """A report without pictures to draw."""
    return replace(reports.report(), **{"pairs": (), "schemes": {}} | changes)


def test_the_page_is_well_formed_and_stands_alone() -> None:
    document = Document(rendered())
    assert not document.all("script") and not document.all("link") and not document.all("iframe")
    for _, attributes in document.tags:
        for key in ("src", "srcset", "href"):
            assert (attributes.get(key) or "#").startswith(("data:image/", "#"))
    assert "url(" not in rendered() and "@import" not in rendered()
    policy = next(a for a in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    targets = {a["id"] for _, a in document.tags if "id" in a}
    assert {str(a["href"])[1:] for a in document.all("a")} == targets and len(targets) == 7


def test_every_picture_decodes_and_has_words() -> None:
    document = Document(rendered())
    assert len(document.all("img")) == len(document.all("source")) == 3 + 1 + 1 + 6  # bars, heatmap, errors, surfaces
    for attributes in document.all("img"):
        assert len(str(attributes["alt"])) > 40
    for uri in [a["src"] for a in document.all("img")] + [a["srcset"] for a in document.all("source")]:
        check_picture(str(uri))


def test_what_the_page_says_is_what_was_measured() -> None:
    text, report = Document(rendered()).text, reports.report()
    assert f"{report.unquantized.before.value:.3f} ± {report.unquantized.before.error:.3f}" in text
    gain = report.schemes[reports.SCHEME].gain
    assert f"{math.exp(gain.mean):.4f} ± {math.exp(gain.mean) * gain.error:.4f}" in text
    worst = max((p for p in report.pairs if p.kind == INPUT), key=lambda p: p.before.ratio)
    assert short(worst.before.ratio) in text and label(worst) in text
    assert report.certificate is not None and report.certificate["verdict"] in text
    assert f"{report.plan.flops:,} FLOP per token" in text and f"{report.bytes[1]:,}" in text
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
        schemes={_NASTY: reports.report().schemes[reports.SCHEME]},
        versions={_NASTY: _NASTY},
        seconds={_NASTY: 1.0},
    )
    document = Document(page.render(odd))
    assert not document.all("script") and document.text.count(_NASTY) >= 10
    assert any(_NASTY in str(a["alt"]) for a in document.all("img"))


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
    assert "excluded by 'R4:*'" in text and "Not certified: switched off." in text and "not certified" in text
    assert "Nothing was refused." in Document(page.render(bare(plan=replace(plan, refusals=())))).text


def test_a_failed_certificate_is_red() -> None:
    certificate = dict(reports.report().certificate or {}) | {"ok": False, "verdict": "NOT equivalent: logits"}
    text = page.render(bare(certificate=certificate))
    assert '<em class="bad">NOT the same function</em>' in text and '<p class="bad">NOT equivalent: logits</p>' in text


def test_one_window_has_no_standard_error() -> None:
    single = Perplexity((2.0,), 11)
    text = Document(page.render(bare(windows=1, unquantized=Comparison(single, single, 1.0, (0.0,))))).text
    assert "7.389" in text and "±" not in text.split("±", 1)[1].split("Quantization error")[0]
    assert "1 window of" in text and "nan" not in text


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the report of yesterday")
    ticks: list[tuple[int, int]] = []
    page.write_page(bare(), path, lambda *at: ticks.append(at))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and ticks[-1] == (7, 7)
    written = path.read_text(encoding="utf-8")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExportError, match="the disk is full"):
        page.write_page(bare(), path)
    assert path.read_text(encoding="utf-8") == written and [p.name for p in tmp_path.iterdir()] == ["report.html"]

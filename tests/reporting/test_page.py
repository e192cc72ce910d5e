"""The page: well-formed, self-contained, nothing that names say is taken for markup, every picture decodes."""

from __future__ import annotations

import base64
import io
import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
from PIL import Image  # a dependency of matplotlib

import spinpass
from spinpass.errors import ExportError
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.reporting import page
from spinpass.reporting.activations import INPUT, Name, Pair, Unpaired
from spinpass.reporting.families import families, joined, label, worst_of_each
from spinpass.reporting.markup import Html, table, tag
from spinpass.reporting.numbers import short
from spinpass.reporting.pictures import bars, heatmaps, surfaces
from spinpass.reporting.statistics import Accumulator
from tests.support import reports

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


def check_picture(uri: str) -> int:
    """It is SVG that can be parsed, and so are the bitmaps in it, which are counted."""
    head, data = uri.split(",", 1)
    assert head == "data:image/svg+xml;base64"
    root = ElementTree.fromstring(base64.b64decode(data, validate=True))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    bitmaps = list(root.iter("{http://www.w3.org/2000/svg}image"))
    for bitmap in bitmaps:
        inner, pixels = bitmap.attrib["{http://www.w3.org/1999/xlink}href"].split(",", 1)
        assert inner == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(pixels)))
        assert len(image.convert("RGBA").getcolors(1 << 24) or []) > 1, "something is painted"
    return len(bitmaps)


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


def test_the_numbers_are_one_json_document() -> None:
    found = json.loads(json.dumps(reports.report().to_dict(), allow_nan=False))
    sites = found["activations"]["sites"]
    assert len(sites) == len(reports.report().pairs) and sites[0]["before"]["max_over_median"] > 1
    scheme = found["schemes"][reports.SCHEME]
    assert scheme["rotated"]["errors"].keys() == scheme["original"]["errors"].keys()
    assert scheme["original"]["bytes"] == scheme["rotated"]["bytes"] < found["bytes"]["before"]
    assert [row[:2] for row in reports.report().perplexities()][-1] == (reports.SCHEME, "rotated")


# -- the parts --------------------------------------------------------------------------------------------------------


def test_markup_escapes_everything_but_markup() -> None:
    assert tag("p", "<b>", Html("<i>x</i>"), title='a"b') == '<p title="a&quot;b">&lt;b&gt;<i>x</i></p>'
    made = table(("a", "<b>"), [("<c>", 1.5)], numbers=1, caption="<d>")
    assert '<td class="number">1.5</td>' in made and "<td>&lt;c&gt;</td>" in made and "&lt;d&gt;" in made


def test_families() -> None:
    assert joined(["m.0.q.weight", "m.0.k.weight"]) == "m.0.{q,k}" and joined(["a.b.weight", "c"]) == "a.b, c"
    found = families([("m.3.x", (1.0, 2.0)), ("m.7.x", (3.0, 4.0)), ("head", (5.0, 6.0))])
    assert found == {"m.*.x": [(3, 1.0, 2.0), (7, 3.0, 4.0)], "head": [(0, 5.0, 6.0)]}
    experts = families((f"m.0.e.{k}.w", (1.0, 1.0)) for k in range(3))
    assert [place for place, *_ in experts["m.*.e.*.w"]] == [0, 1, 2], "several of one layer stand side by side"


def test_the_worst_of_each_family_comes_first() -> None:
    report = reports.report()
    worst = worst_of_each(report.pairs, 3)
    ratios = [p.before.ratio for p in worst]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] == max(p.before.ratio for p in report.pairs)
    assert len({label(p).replace("0", "1") for p in worst}) == 3


def test_bars_leave_out_what_is_not_finite_and_do_not_read_mathematics() -> None:
    made = bars("x", {"$\\frac{a}$": [(0, math.inf, 1.0), (1, math.nan, -2.0)], "b_c": [(0, 3.0, 4.0)]})
    assert "∞" in made.alt and "b_c" in made.alt
    assert made.light != made.dark
    same = bars("x", {"p": [(0, 1.0, 2.0)]})
    assert same == bars("x", {"p": [(0, 1.0, 2.0)]}), "the same numbers are the same file"


def test_a_surface_of_zeros_can_be_drawn() -> None:
    gathered = Accumulator(1)
    gathered.update(torch.zeros(1, 1))
    flat = surfaces("nothing", gathered.result(), gathered.result(), "token")
    assert check_picture(flat.light) == 0


def test_a_heatmap_has_two_panels_for_every_kind_of_layer() -> None:
    wide, narrow = torch.rand(5000), torch.rand(8)
    wide[4321] = 100
    made = heatmaps({"a": [(0, wide, wide), (4, wide[:4000], wide[:4000])], "$b_c$": [(0, narrow, narrow)]})
    assert check_picture(made.light) >= 4 and "$b_c$" in made.alt and made.light != made.dark


def test_a_surface_shows_its_spike_in_red() -> None:
    spiky, flat = Accumulator(60), Accumulator(60)
    x = torch.full((30, 60), 0.1)
    flat.update(x)
    x[15, 30] = 9
    spiky.update(x)
    made = surfaces("spike", spiky.result(), flat.result(), "token")
    assert check_picture(made.light) == check_picture(made.dark) == 2
    svg = base64.b64decode(made.light.split(",", 1)[1]).decode()
    reds = []
    for part in svg.split("data:image/png;base64,")[1:]:
        image = Image.open(io.BytesIO(base64.b64decode(part.split('"', 1)[0]))).convert("RGBA")
        reds.append(sum(n for n, (r, g, b, a) in image.getcolors(1 << 24) or [] if a == 255 and r > 150 > 2 * b))  # type: ignore[misc]
    assert reds[0] > 20 and reds[1] == 0


@pytest.mark.parametrize(
    ("number", "text"), [(math.nan, "–"), (math.inf, "∞"), (12345.6, "12,346"), (0.01234, "0.0123"), (-3.0, "-3")]
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text

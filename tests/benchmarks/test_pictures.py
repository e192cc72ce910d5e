"""The pictures of the documentation: those that lie there are what the code draws, say what is so, and can be read."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.imports import ROOT
from benchmarks.pictures import pareto, passes
from benchmarks.pictures.__main__ import HOME, PICTURES, main
from benchmarks.pictures.anatomy import draw_block
from benchmarks.pictures.canvas import GROUNDS, INKS, SMALL, WIDTH, Canvas
from benchmarks.pictures.decoder import read_block
from benchmarks.pictures.outlier import rounding_error, vector_in_two_bases
from benchmarks.screenshots.browser import WIDTHS
from spinpass import RotationConfig
from spinpass.pipeline import PASSES

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


@cache
def drawn(name: str) -> str:
    return PICTURES[name]()


@pytest.mark.parametrize("name", PICTURES)
def test_what_lies_there_is_what_the_code_draws(name: str) -> None:
    assert (HOME / f"{name}.svg").read_text(encoding="utf-8") == drawn(name), "`make pictures` draws it anew"


def test_nothing_else_lies_there() -> None:
    screenshots = {f"report-{width}-{scheme}.png" for width in WIDTHS for scheme in ("light", "dark")}
    assert {path.name for path in HOME.iterdir()} == {f"{name}.svg" for name in PICTURES} | screenshots


def test_the_command_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PICTURES:
        monkeypatch.setitem(PICTURES, name, lambda: "<svg/>")
    main(tmp_path / "new")
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == sorted(PICTURES)
    assert len(capsys.readouterr().out.splitlines()) == len(PICTURES)


# -- they can be read --------------------------------------------------------------------------------------------------


def labels(svg: str) -> list[tuple[str, Box]]:
    """Every text with the box that it takes in DejaVu Sans, which is wider than the fonts that are asked for first."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    found = []
    for each in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        text, size = each.text or "", float(each.attrib["font-size"])
        font = FontProperties(family="DejaVu Sans", weight=each.attrib.get("font-weight", "normal"))
        extents = TextPath((0, 0), text, size=size, prop=font, usetex=False).get_extents()
        x, y, width = float(each.attrib["x"]), float(each.attrib["y"]), extents.width
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[each.attrib["text-anchor"]] * width
        found.append((text, (left, y - 0.75 * size, left + width, y + 0.2 * size)))
    return found


def rectangles(svg: str) -> list[Box]:
    root = ElementTree.fromstring(svg)
    boxes = [[float(r.attrib.get(k, 0)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect")]
    return [(x, y, x + width, y + height) for x, y, width, height in boxes]


def inside(one: Box, other: Box) -> bool:
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]


def faults(svg: str) -> list[str]:
    """Texts that are too small, leave the sheet or the box that they stand in, or cover each other."""
    sizes = [float(each.attrib["font-size"]) for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    found = [f"a text of {size}" for size in sizes if size < SMALL]
    written, boxes = labels(svg), rectangles(svg)
    for text, box in written:
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        around = [each for each in boxes if inside((*middle, *middle), each)]
        smallest = min(around, key=lambda each: (each[2] - each[0]) * (each[3] - each[1]), default=(0, 0, 0, 0))
        found += [] if inside(box, smallest) else [f"{text!r} leaves what it stands in"]
    for (a, one), (b, other) in combinations(written, 2):
        if one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]:
            found.append(f"{a!r} and {b!r} cover each other")
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_is_small_or_covered_or_cut(name: str) -> None:
    pytest.importorskip("matplotlib")
    assert not faults(drawn(name))


def test_what_cannot_be_read_is_seen() -> None:
    pytest.importorskip("matplotlib")
    sheet = Canvas("a", "b")
    sheet.text(50, 20, "one text")
    sheet.text(60, 22, "another")
    sheet.text(WIDTH - 10, 60, "over the edge")
    sheet.area(10, 80, 30, 20, "panel")
    sheet.text(25, 90, "too long for it")
    sheet.text(200, 90, "small", size=8)
    found = faults(sheet.svg(100))
    assert found == [
        "a text of 8.0", "'over the edge' leaves what it stands in", "'too long for it' leaves what it stands in",
        "'one text' and 'another' cover each other",
    ]  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_who_does_not_see_it_is_told(name: str) -> None:
    root = ElementTree.fromstring(drawn(name))
    title, description = root.findtext(f"{SVG}title"), root.findtext(f"{SVG}desc")
    assert title and description and description.endswith(".") and root.attrib["role"] == "img"


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("when", [0, 1], ids=["day", "night"])
def test_the_letters_stand_out(when: int) -> None:
    """By the ratio that WCAG 2 asks of text, 4.5, on every ground that a colour is used on."""
    for name in INKS.keys() - {"grid"}:
        for ground in ("ground", "panel", *({name} & GROUNDS.keys())):
            light, dark = sorted((luminance(INKS[name][when]), luminance(GROUNDS[ground][when])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


# -- they say what is so -----------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_pipeline_has_the_passes_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [each.name for each in PASSES]
    assert [text for text in texts(drawn("pipeline")) if text in names] == names
    assert passes.MEANINGS.keys() == set(names)
    monkeypatch.setattr(passes, "PASSES", PASSES[::-1])
    assert passes.draw_pipeline() != drawn("pipeline")


def test_the_block_is_drawn_from_the_plan() -> None:
    block = read_block(RotationConfig(form="offline"))
    types = {name: " ".join(axis.label for axis in axes) for name, axes in block.tensors.items()}
    assert {name: types[name] for name in ("q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head")} == {
        "q_proj": "64 R1", "v_proj": "2×R2 R1", "o_proj": "R1 4×R2", "down_proj": "R1 R4", "embed_tokens": "96 R1", "lm_head": "96 R1",
    }  # fmt: skip
    assert (
        types["query"] == types["key"] == "b 4 t R3"
        and types["up_proj result"] == "b t 80"
        and types["stream"] == "b t R1"
    )
    assert block.online == {"query": "R3", "key": "R3", "down_proj input": "R4"}
    assert block.scaled == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}


def test_what_is_not_rotated_is_not_drawn() -> None:
    svg = draw_block(RotationConfig(rotations="R1,R2", form="online"), "t", ["b"])  # type: ignore[arg-type]
    shown = texts(svg)
    assert "Hadamard R3" not in shown and "Hadamard R4" not in shown and shown.count("Hadamard R1") == 3
    assert shown.count("R1ᵀ") == 0 and shown.count("R2ᵀ") == 1
    offline = texts(drawn("rotations"))
    assert offline.count("R1ᵀ") == 2 and offline.count("Hadamard R1") == 0 and offline.count("Hadamard R3") == 2


def test_a_hadamard_levels_the_vector() -> None:
    before, after = vector_in_two_bases()
    assert float(before.norm() - after.norm()) == pytest.approx(0, abs=1e-12)
    shown = " ".join(texts(drawn("outlier")))
    assert (
        f"error {100 * rounding_error(before):.0f}%" in shown and f"error {100 * rounding_error(after):.0f}%" in shown
    )
    assert rounding_error(after) < 0.4 * rounding_error(before)


def tables() -> list[str]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    lines = (line for path in documents for line in path.read_text(encoding="utf-8").splitlines())
    return [line.replace("*", "") for line in lines if line.startswith("|")]


def untold(rows: list[dict[str, object]]) -> list[str]:
    """The rows that no table of the documents shows: the megabytes and both ratios in one line."""
    found = []
    for row in rows:
        numbers = [row["MB"], *row["ratios"].values()]  # type: ignore[attr-defined]
        patterns = [rf"\| {re.escape(f'{n:g}')}0* (\||±)" for n in numbers]
        if not any(all(re.search(pattern, line) for pattern in patterns) for line in tables()):
            found.append(str(row["row"]))
    return found


def test_the_measured_rows_are_those_of_the_documents() -> None:
    rows = json.loads(pareto.MEASURED.read_text(encoding="utf-8"))["rows"]
    assert not untold(rows)
    assert untold([rows[0] | {"MB": 1.0}, rows[1] | {"ratios": {"help": 1.0, "code": 1.032}}]) == [
        rows[0]["row"],
        rows[1]["row"],
    ]


def test_every_measured_row_is_a_point() -> None:
    root = ElementTree.fromstring(drawn("pareto"))
    told = [each.text or "" for each in root.iter(f"{SVG}title")]
    for row in pareto.measured_rows():
        tool, way = row["row"].split(":")
        point = f"{pareto.NAMES[tool]} {way}: {row['MB']:.1f} MB, +{100 * (row['mean'] - 1):.1f}%"
        assert point in told

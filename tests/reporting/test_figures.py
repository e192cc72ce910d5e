"""Axes and drawings of numbers that are hard to draw, and pictures of colours that decode."""

from __future__ import annotations

import base64
import math
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from itertools import pairwise

import pytest
import torch

from spinpass.reporting.figures import Axis, Sheet, heat, tick


def decoded(uri: str) -> list[list[tuple[int, ...]]]:
    """The pixels of a PNG of 8-bit colours without filters, whose checksums are right."""
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    left, chunks = base64.b64decode(data)[8:], {}
    while left:
        size, kind = struct.unpack(">I4s", left[:8])
        body, check = left[8 : 8 + size], struct.unpack(">I", left[8 + size : 12 + size])[0]
        assert check == zlib.crc32(kind + body)
        chunks[kind], left = body, left[12 + size :]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = zlib.decompress(chunks[b"IDAT"])
    lines = [rows[k * (1 + 3 * width) :][: 1 + 3 * width] for k in range(height)]
    assert all(line[0] == 0 for line in lines)
    return [[tuple(line[1 + 3 * x : 4 + 3 * x]) for x in range(width)] for line in lines]


def test_more_is_brighter() -> None:
    pixels = decoded(heat(torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0], [-1.0, 0.0, 0.0, 1.0, 2.0]])))
    brightness = [sum(pixel) for pixel in pixels[0]]
    assert brightness == sorted(brightness) and len(set(brightness)) == 5
    assert pixels[1] == [pixels[0][0]] * 3 + [pixels[0][4]] * 2, "what is beyond the ends is at them"


@pytest.mark.parametrize(
    ("numbers", "lowest", "ticks"),
    [
        ([3.0, 4.0], None, (2, 5, 10, 20)),
        ([0.002, 30.0, math.nan, math.inf, 0.0], None, (0.01, 0.1, 1, 10)),
        ([2.0, 1000.0], 1.0, (1, 10, 100, 1000)),
        ([], None, (1, 2, 5, 10)),
        ([-3.0, 200.0], None, (-10, -1, 0, 1, 10, 100, 1000)),
    ],
)
def test_decades(numbers: list[float], lowest: float | None, ticks: tuple[float, ...]) -> None:
    axis = Axis.decades(numbers, lowest)
    assert axis.ticks == pytest.approx(ticks)
    places = [axis.place(value, 100, 0) for value in axis.ticks]
    assert places == sorted(places, reverse=True) and all(-1e-9 <= place <= 100 + 1e-9 for place in places)
    assert axis.place(1e30, 100, 0) == 0 and axis.place(-1e30, 100, 0) == 100, "beyond the axis is at its end"


@pytest.mark.parametrize("numbers", [[1.0, 1.0], [0.999, 1.004], [1.0, 1.3], [1.0, 17.4], [1.0, 4e6], [math.inf]])
def test_ratios_have_numbers_beside_them(numbers: list[float]) -> None:
    axis = Axis.ratios(numbers)
    shown = axis.shown(226, 12)
    assert len(shown) >= 2 and all(a[1] - b[1] >= 17 for a, b in pairwise(shown))
    assert all(0 < axis.place(x, 0, 1) < 1 for x in numbers if math.isfinite(x)), "no point lies on the edge"


@pytest.mark.parametrize("numbers", [[92.0], [0.0141, 0.0496], [92.0, 538.0], [5.0, 50_000.0]])
def test_sizes_have_round_numbers(numbers: list[float]) -> None:
    axis = Axis.sizes(numbers)
    assert 2 <= len(axis.ticks) <= 8 and all(axis.low <= t <= axis.high for t in axis.ticks)
    assert all(0 < axis.place(x, 0, 1) < 1 for x in numbers)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1e-5, "1e-5"), (150, "150"), (1e3, "1k"), (2.5e6, "2.5M"), (-1e4, "-10k"), (1e9, "1G")],
)
def test_numbers_beside_an_axis_are_short(value: float, text: str) -> None:
    assert tick(value) == text


def test_a_drawing_is_svg_that_says_its_numbers() -> None:
    sheet = Sheet(100, 50, 'a "b" & <c>')
    sheet.text(1, 2, "<t>")
    sheet.dot(3, 4, 2, "before", "one < two")
    sheet.diamond(3, 4, 2, "file")
    sheet.fill([(0, 0), (1.25, 1), (1, 0)], "after")
    root = ElementTree.fromstring(sheet.svg())
    assert root.attrib["aria-label"] == 'a "b" & <c>' and root.attrib["viewBox"] == "0 0 100 50"
    assert [each.text for each in root.iter("title")] == ["one < two"] and root.findtext("text") == "<t>"
    assert root.findall("polygon")[1].attrib["points"] == "0,0 1.2,1 1,0"

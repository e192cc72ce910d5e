"""Size against quality: megabytes against perplexity, a line along the files that no other is better than in both.

``measured.json`` holds the rows of the tables that the documents show, as ``make peers`` and ``make yardstick`` have
measured them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .canvas import MARGIN, SMALL, WIDTH, Canvas

MEASURED = Path(__file__).with_name("measured.json")
NAMES = {
    "spinpass": "spinpass",
    "llama": "llama.cpp",
    "genai": "GenAI's builder",
    "autoround": "AutoRound",
    "olive": "Olive",
}
MARKS = {"spinpass": "circle", "llama": "down", "genai": "square", "autoround": "up", "olive": "diamond"}
LEAST = 1e-3  # of a ratio above 1: what is nearer is drawn there
_HEIGHT, _LEFT, _RIGHT = 330.0, 54.0, WIDTH - 16.0  # of the field
_LETTER = 7.2  # how wide a small letter is at most, on average

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def front(points: Mapping[str, Point]) -> list[str]:
    """Return the names of the points (x, y) that no other is at most as large as in both, by x."""
    found: list[str] = []
    best = float("inf")
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < best:
            found.append(name)
            best = y
    return found


def measured_rows() -> list[dict[str, Any]]:
    """Return the measured rows in the form in which ``benchmarks.peers`` makes them."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    return [
        {**row, "bytes": 1e6 * row["MB"], "mean": math.exp(statistics.fmean(map(math.log, row["ratios"].values())))}
        for row in rows
    ]


def draw_pareto() -> str:
    """Draw the rows that the documents show."""
    about = json.loads(MEASURED.read_text(encoding="utf-8"))["about"]
    return draw_rows(measured_rows(), about)


def draw_rows(rows: Sequence[Mapping[str, Any]], about: str) -> str:
    """Draw the rows that have a ratio, but for the model in floats.

    Args:
        rows: each with ``row`` (TOOL:WAY), ``bytes`` and ``mean``, the perplexity divided by that of the float model.
        about: what was measured; it becomes part of the description.
    """
    drawn = [row for row in rows if "mean" in row and not row["row"].endswith((":float", ":fp32"))]
    found = {row["row"]: (row["bytes"] / 1e6, max(row["mean"] - 1, LEAST)) for row in drawn}
    sheet = Canvas("Megabytes against perplexity", f"{about}. {_told(found)}")
    y = sheet.heading(
        "Size against quality",
        "Left is smaller, down is better. Along the line lie the files",
        "that no other one beats in both.",
    )
    y = _legend(sheet, y, {name.split(":")[0] for name in found})
    field = _Field(y + 22, list(found.values()) or [(1.0, LEAST)])
    sheet.text(MARGIN, y + 8, "perplexity above that of the float model", "faint", size=SMALL, anchor="start")
    field.grid(sheet)
    points = {name: field.at(point) for name, point in found.items()}
    corners = [points[name] for name in front(found)]
    line = [leg for (x0, y0), (x1, y1) in pairwise(corners) for leg in ((x0, y0, x1, y0), (x1, y0, x1, y1))]
    for x0, y0, x1, y1 in line:
        sheet.line([(x0, y0), (x1, y1)], "faint")
    for name, (x, top) in points.items():
        tool, _, way = name.partition(":")
        sheet.mark(
            x, top, MARKS[tool], tool, f"{NAMES[tool]} {way}: {found[name][0]:.1f} MB, +{100 * found[name][1]:.1f}%"
        )
    _names(
        sheet,
        points,
        front(found),
        [(x0 - 1, min(y0, y1) - 1, x1 + 1, max(y0, y1) + 1) for x0, y0, x1, y1 in line],
        field,
    )
    return sheet.svg(field.bottom + 44)


def _told(found: Mapping[str, Point]) -> str:
    """Say the points along the line in words."""
    told = [
        f"{NAMES[n.split(':')[0]]} {n.split(':')[1]}: {found[n][0]:.1f} MB, {100 * found[n][1]:.1f}% above"
        for n in front(found)
    ]
    return "On the line: " + "; ".join(told) + "."


def _legend(sheet: Canvas, y: float, tools: set[str]) -> float:
    places = [(MARGIN + 6 + 128 * (k % 3), y + 22 * (k // 3)) for k in range(len(NAMES))]
    for (x, top), tool in zip(places, (name for name in NAMES if name in tools)):
        sheet.mark(x, top, MARKS[tool], tool, NAMES[tool])
        sheet.text(x + 11, top, NAMES[tool], tool, size=SMALL, anchor="start")
    return y + 22 * ((len(tools) + 2) // 3)


class _Field:
    """The field of points: megabytes to the right, the logarithm of what is lost upwards.

    Args:
        top: the y of its upper edge.
        points: what has to lie in it.
    """

    def __init__(self, top: float, points: Sequence[Point]) -> None:
        self.top, self.bottom = top, top + _HEIGHT
        sizes, losses = zip(*points)
        self._step = next((s for s in (5, 10, 20, 50, 100, 200, 500, 1000) if (max(sizes) - min(sizes)) / s <= 6), 5000)
        self._from = self._step * math.floor((min(sizes) - 0.2 * self._step) / self._step)
        self._to = self._step * math.ceil((max(sizes) + 0.2 * self._step) / self._step)
        self._low, self._high = math.log10(min(losses)) - 0.12, math.log10(max(losses)) + 0.12

    def at(self, point: Point) -> Point:
        """Return where a point lies on the sheet."""
        x = (point[0] - self._from) / (self._to - self._from)
        y = (math.log10(point[1]) - self._low) / (self._high - self._low)
        return _LEFT + x * (_RIGHT - _LEFT), self.bottom - y * _HEIGHT

    def grid(self, sheet: Canvas) -> None:
        """Draw the field with its lines and numbers."""
        sheet.area(_LEFT, self.top, _RIGHT - _LEFT, _HEIGHT, "panel", edge="none", round_=0)
        for value in (m * 10.0**e for e in range(-4, 3) for m in (1, 2, 5)):
            if self._low < math.log10(value) < self._high:
                _, y = self.at((self._from, value))
                sheet.line([(_LEFT, y), (_RIGHT, y)], "grid")
                sheet.text(_LEFT - 6, y, f"{100 * value:g}%", "faint", size=SMALL, anchor="end")
        for size in range(self._from, self._to + 1, self._step):
            x, _ = self.at((size, 10**self._low))
            sheet.text(x, self.bottom + 13, f"{size}", "faint", size=SMALL)
        sheet.text((_LEFT + _RIGHT) / 2, self.bottom + 30, "MB", "faint", size=SMALL)


def _names(
    sheet: Canvas, points: Mapping[str, Point], first: Sequence[str], line: Sequence[Box], field: _Field
) -> None:
    """Write beside each point what it is, where that covers nothing: those on the line first, then from the best."""
    taken = [*line, *((x - 6, y - 6, x + 6, y + 6) for x, y in points.values())]
    rest = sorted(points.keys() - set(first), key=lambda name: -points[name][1])
    for name in (*first, *rest):
        tool, _, way = name.partition(":")
        text = f"--bits {way}" if tool == "spinpass" and way.isdigit() else way
        for box, anchor in _places(points[name], _LETTER * len(text)):
            inside = box[0] > _LEFT + 2 and box[2] < _RIGHT - 2 and box[1] > field.top and box[3] < field.bottom
            if inside and not any(_overlap(box, other) for other in taken):
                x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
                sheet.text(x, (box[1] + box[3]) / 2, text, tool, size=SMALL, anchor=anchor, bold=name in first)
                taken.append(box)
                break


def _places(point: Point, width: float) -> Iterator[tuple[Box, str]]:
    """Yield the boxes in which a name could stand beside its point."""
    x, y = point
    for dx, anchor in ((9, "start"), (-9 - width, "end"), (-width / 2, "middle")):
        for dy in (0, -8, 8, -13, 13) if anchor != "middle" else (-15, 15):
            yield (x + dx, y + dy - 7, x + dx + width, y + dy + 7), anchor


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

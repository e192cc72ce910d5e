"""Size, quality and speed of every program and file: one panel of size × quality, one of speed × quality.

    (megabytes, perplexity ÷ unquantized)  and  (tokens per second, perplexity ÷ unquantized)

A line runs along the points that no other is better than in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .figures import LETTER, Axis, Point, Sheet, tick
from .markup import Html, tag
from .numbers import short, times
from .panels import legend, panel

_WIDTH, _HEIGHT = 360.0, 284.0
_LEFT, _RIGHT, _TOP, _LOW = 50.0, 350.0, 26.0, 240.0
_MARKS = {"before": 5.0, "after": 5.0, "file": 6.5, "plain": 4.5}  # by kind, the size of its mark
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Measured:
    """One program or file.

    ``name``: the scheme or the folder; ``kind``: ``before`` and ``after`` rotation, ``file``, or ``plain`` for what is
    not quantized; ``ratio``: perplexity ÷ that of the unquantized program; ``speed``: tokens per second of generation,
    nan where nothing was timed.
    """

    name: str
    kind: str
    bytes: int
    ratio: float
    speed: float = math.nan


def pareto(points: Sequence[Measured], called: Mapping[str, str]) -> Html:
    """Draw the points in one panel or two; a panel whose points all lie on one place is left out.

    ``called``: by kind, what such points are called.
    """
    finite = [p for p in points if math.isfinite(p.ratio) and p.ratio > 0]
    timed = [p for p in finite if math.isfinite(p.speed)]
    drawn = []
    for title, x_name, shown, xs in (
        ("size × quality", "MB", finite, [p.bytes / 1e6 for p in finite]),
        ("speed × quality", "tokens per second", timed, [-p.speed for p in timed]),
    ):
        if len({(x, p.ratio) for x, p in zip(xs, shown)}) > 1:
            drawn.append(panel(title, _field(x_name, shown, xs, called), f"{title}: lower is better"))
    kinds = [kind for kind in called if any(p.kind == kind for p in finite)]
    if not drawn:
        return Html()
    return Html(legend([called[k] for k in kinds], kinds) + tag("div", *drawn, class_="panels wide"))


def front(points: Sequence[Point]) -> list[int]:
    """Which of the points (x, y) no other is at most as large as in both, by x."""
    found: list[int] = []
    best = math.inf
    for k in sorted(range(len(points)), key=points.__getitem__):
        if points[k][1] < best:
            found.append(k)
            best = points[k][1]
    return found


def _field(x_name: str, points: Sequence[Measured], xs: Sequence[float], called: Mapping[str, str]) -> Html:
    """One panel. Where ``xs`` are negative, larger numbers are better: they are drawn to the right."""
    across, up = Axis.sizes([abs(x) for x in xs]), Axis.ratios(p.ratio for p in points)
    best = front([(x, p.ratio) for x, p in zip(xs, points)])
    told = "; ".join(f"{points[k].name}: {short(abs(xs[k]))} {x_name}, {times(points[k].ratio)} ×" for k in best)
    sheet = Sheet(_WIDTH, _HEIGHT, f"perplexity ÷ unquantized over {x_name}. Best: {told}")
    for value, y in up.shown(_LOW, _TOP):
        sheet.line([(_LEFT, y), (_RIGHT, y)], "grid")
        sheet.text(_LEFT - 6, y, f"{value:g}", "end")
    for value, x in across.shown(_LEFT, _RIGHT, 44):
        sheet.line([(x, _TOP), (x, _LOW)], "grid")
        sheet.text(x, _LOW + 14, tick(value))
    sheet.text(0, 8, "perplexity ÷ unquantized", "start")
    sheet.text((_LEFT + _RIGHT) / 2, _LOW + 34, x_name)
    places = [(across.place(abs(x), _LEFT, _RIGHT), up.place(p.ratio, _LOW, _TOP)) for x, p in zip(xs, points)]
    lines = _lines(sheet, points, places, best)
    for (x, y), point in zip(places, points):
        speed = f", {short(point.speed)} tokens per second" if math.isfinite(point.speed) else ""
        tip = f"{point.name}, {called[point.kind]}: {times(point.ratio)} × perplexity, {megabytes(point.bytes)}{speed}"
        mark = sheet.diamond if point.kind == "file" else sheet.dot
        mark(x, y, _MARKS[point.kind], f"mark {point.kind}", tip)
    _names(sheet, points, places, best, lines)
    return sheet.svg()


def megabytes(size: int) -> str:
    """``92 MB``, with a digit more where there are few."""
    return f"{size / 1e6:,.0f} MB" if size >= 2e7 else f"{size / 1e6:.3g} MB"


def _lines(sheet: Sheet, points: Sequence[Measured], places: Sequence[Point], best: Sequence[int]) -> list[Box]:
    """Draw the front, and join the two programs of every scheme. Return what the lines cover."""
    drawn: list[tuple[Point, Point]] = []
    corners = [places[k] for k in best]
    for (x0, y0), (x1, y1) in pairwise(corners):
        sheet.line([(x0, y0), (x1, y0), (x1, y1)], "front")
        drawn += [((x0, y0), (x1, y0)), ((x1, y0), (x1, y1))]
    for name in dict.fromkeys(p.name for p in points if p.kind in ("before", "after")):
        pair = [place for place, p in zip(places, points) if p.name == name and p.kind in ("before", "after")]
        if len(pair) > 1:
            sheet.line(pair, "quiet")
            drawn.append((pair[0], pair[1]))
    return [(min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in drawn]


def _names(
    sheet: Sheet, points: Sequence[Measured], places: Sequence[Point], best: Sequence[int], lines: Sequence[Box]
) -> None:
    """Write each name once, beside the better of its points, where that covers nothing; the table has the rest."""
    taken: list[Box] = [*lines, *((x - 7, y - 7, x + 7, y + 7) for x, y in places)]
    rest = sorted(set(range(len(points))) - set(best), key=lambda k: points[k].ratio)
    named: set[str] = set()
    for k in (*best, *rest):
        name = points[k].name
        if name in named:
            continue
        text = name if len(name) <= 24 else f"{name[:23]}…"
        for box, anchor in _beside(places[k], LETTER * len(text)):
            inside = box[0] > _LEFT and box[2] < _RIGHT and box[1] > _TOP - 8 and box[3] < _LOW
            if inside and not any(_overlap(box, other) for other in taken):
                x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
                sheet.text(x, (box[1] + box[3]) / 2, text, anchor, "name")
                taken.append(box)
                named.add(name)
                break


def _beside(place: Point, width: float) -> Iterator[tuple[Box, str]]:
    """Yield the boxes in which a name could stand beside its point."""
    x, y = place
    for dx, anchor in ((10.0, "start"), (-10 - width, "end"), (-width / 2, "middle")):
        for dy in (0, -9, 9, -14, 14) if anchor != "middle" else (-17, 17, -24, 24):
            yield (x + dx, y + dy - 8, x + dx + width, y + dy + 8), anchor


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

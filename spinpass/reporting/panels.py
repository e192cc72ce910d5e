"""Small multiples: a panel for every kind of layer, all on one scale, two numbers for every layer.

Channels are shown as in QuaRot (arXiv 2404.00456, figure 1) and SpinQuant (2405.16406, figure 2): the largest |x| of
each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .figures import LETTERS, Axis, Point, Sheet, heat, tick
from .markup import Html, tag
from .numbers import short
from .statistics import SiteStatistics

SIDES = ("before", "after")
Pairs = Mapping[str, Sequence[tuple[int, float, float]]]  # kind -> (layer, before, after)
Channels = Mapping[str, Sequence[tuple[int, Tensor, Tensor]]]  # kind -> (layer, peaks before, peaks after)

_FEWEST = 3  # layers of a panel: fewer are rows
_WIDTH, _LEFT, _RIGHT = 300.0, 42.0, 292.0  # of a panel; where its field begins and ends
_TOP, _LOW, _HEIGHT = 10.0, 116.0, 140.0
_ROW, _LONGEST = 5.0, 90.0  # the height of a layer, and of all, in a picture of channels
_COLUMNS, _STEPS = 250, 125  # of a picture of channels, of a line of channels
_CHUNKS = 16  # parts of a line of channels that a pointer tells apart
_DYNAMIC = 1e5  # the largest ratio of two peaks that colours tell apart


def layer_panels(what: str, kinds: Pairs, *, lowest: float | None = None, sides: tuple[str, str] = SIDES) -> Html:
    """Draw two lines over the layers in a panel per kind, on one logarithmic scale; kinds of few layers are rows.

    Args:
        what: what the numbers are.
        kinds: the numbers, by kind of layer; what is not finite is left out.
        lowest: where the scale begins; the power of ten below the smallest number by default.
        sides: what the two numbers of a layer are called.

    Returns:
        Nothing where no number is finite.
    """
    shown = {kind: kept for kind, entries in kinds.items() if (kept := [e for e in entries if _finite(e)])}
    if not shown:
        return Html()
    axis = Axis.decades([x for entries in shown.values() for e in entries for x in e[1:]], lowest)
    names = dict(zip(shown, brief(shown)))
    drawn = [
        panel(names[kind], _lines(f"{what}, {kind}", entries, axis, sides), kind)
        for kind, entries in shown.items()
        if len(entries) >= _FEWEST
    ]
    rows = [
        _row(names[kind] if len(entries) == 1 else f"{names[kind]}, layer {entry[0]}", entry, axis, sides)
        for kind, entries in shown.items()
        if len(entries) < _FEWEST
        for entry in entries
    ]
    parts = [legend(sides)]
    parts += [tag("div", *drawn, class_="panels")] if drawn else []
    parts += [tag("div", *rows, class_="rows")] if rows else []
    return Html("".join(parts))


def channel_maps(kinds: Channels) -> Html:
    """Draw the peak of every channel (columns) of every layer (rows) in colours, before above after, on one scale.

    Where there are more channels than pixels, a pixel shows the largest of several. Kinds of few layers are left out.
    """
    shown = {kind: layers for kind, layers in kinds.items() if len(layers) >= _FEWEST}
    peaks = [peaks for layers in shown.values() for _, *both in layers for peaks in both]
    if not peaks:
        return Html()
    top = max(float(side.max()) for side in peaks) or 1.0
    bottom = max(min(float(side[side > 0].min()) if (side > 0).any() else top for side in peaks), top / _DYNAMIC)
    ends = (min(bottom, top / 2), top)
    drawn = [panel(name, _map(kind, shown[kind], ends), kind) for kind, name in zip(shown, brief(shown))]
    return Html(_scale(*ends) + tag("div", *drawn, class_="panels"))


def channel_lines(sites: Mapping[str, tuple[SiteStatistics, SiteStatistics]]) -> Html:
    """Draw the peak of every channel of single sites as two lines, each panel on a scale of its own."""
    drawn = [
        panel(name, _profile(site, *sites[site]), f"{site}: {_told(*sites[site])}")
        for site, name in zip(sites, brief(sites))
    ]
    return Html(legend(SIDES) + tag("div", *drawn, class_="panels")) if drawn else Html()


def panel(name: str, drawing: Html, tip: str = "") -> Html:
    """A drawing under its name."""
    return tag("figure", tag("figcaption", name, title=tip or name), drawing, class_="panel")


def legend(sides: Sequence[str], kinds: Sequence[str] = SIDES) -> Html:
    """What the colours mean."""
    return tag("p", *(tag("span", side, class_=f"key {kind}") for side, kind in zip(sides, kinds)), class_="legend")


def brief(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Names without what stands before the number of the layer, where they still differ."""
    short_names = [_brief(name) for name in names]
    return short_names if len(set(short_names)) == len(short_names) else list(names)


def _brief(name: str) -> str:
    if " of " in name:
        kind, _, rest = name.partition(" of ")
        return f"{kind} of {rest.rpartition('*.')[2]}"
    return name.rpartition("*.")[2]


def _finite(entry: tuple[int, float, float]) -> bool:
    return any(map(math.isfinite, entry[1:]))


def _lines(alt: str, entries: Sequence[tuple[int, float, float]], axis: Axis, sides: tuple[str, str]) -> Html:
    sheet = Sheet(_WIDTH, _HEIGHT, f"{alt}: {_extremes(entries, sides)}")
    _grid(sheet, axis)
    step = (_RIGHT - _LEFT) / len(entries)
    middles = [_LEFT + (k + 0.5) * step for k in range(len(entries))]
    for side, kind in enumerate(SIDES, 1):
        run: list[Point] = []
        for x, entry in zip(middles, entries):
            if math.isfinite(entry[side]):
                run.append((x, axis.place(entry[side], _LOW, _TOP)))
                sheet.dot(*run[-1], min(2.5, max(1.2, step / 4)), kind)
            if run and not math.isfinite(entry[side]):
                sheet.line(run, kind)
                run = []
        sheet.line(run, kind)
    for x, (layer, *values) in zip(middles, entries):
        told = ", ".join(f"{side} {short(value)}" for side, value in zip(sides, values))
        sheet.area(x - step / 2, _TOP, step, _LOW - _TOP, "hover", f"layer {layer}: {told}")
    sheet.text(middles[0], _LOW + 14, f"layer {entries[0][0]}", "start" if middles[0] < _LEFT + 20 else "middle")
    sheet.text(middles[-1], _LOW + 14, str(entries[-1][0]), "end" if middles[-1] > _RIGHT - 12 else "middle")
    return sheet.svg()


def _row(name: str, entry: tuple[int, float, float], axis: Axis, sides: tuple[str, str]) -> Html:
    """A kind of layer that there is once or twice: its name, both numbers, and both as dots on one line."""
    told = ", ".join(f"{side} {short(value)}" for side, value in zip(sides, entry[1:]))
    sheet = Sheet(200, 20, f"{name}: {told}")
    sheet.line([(8, 10), (192, 10)], "grid")
    places = [(axis.place(value, 8, 192), kind) for value, kind in zip(entry[1:], SIDES) if math.isfinite(value)]
    sheet.line([(x, 10) for x, _ in places], "quiet")
    for x, kind in places:
        sheet.dot(x, 10, 5, kind)
    sheet.area(0, 0, 200, 20, "hover", told)
    values = (tag("em", short(value), class_=kind) for value, kind in zip(entry[1:], SIDES))
    return tag("div", tag("span", name), tag("b", *_between(values, " → ")), sheet.svg(), class_="row")


def _between(parts: Iterator[Html], what: str) -> list[object]:
    found: list[object] = []
    for part in parts:
        found += [what, part] if found else [part]
    return found


def _grid(sheet: Sheet, axis: Axis) -> None:
    for value, y in axis.shown(_LOW, _TOP):
        sheet.line([(_LEFT, y), (_RIGHT, y)], "grid")
        sheet.text(_LEFT - 5, y, tick(value), "end")


def _map(alt: str, layers: Sequence[tuple[int, Tensor, Tensor]], ends: tuple[float, float]) -> Html:
    low, high = map(math.log, ends)
    widest = max(len(peaks) for _, *both in layers for peaks in both)
    height = min(_ROW * len(layers), _LONGEST)
    sheet = Sheet(_WIDTH, 2 * (height + LETTERS + 8), f"largest |x| of every channel of every layer, {alt}")
    top = 0.0
    for side, name in enumerate(SIDES):
        chosen = [(layer, both[side]) for layer, *both in layers]
        rows = [functional.adaptive_max_pool1d(peaks[None], min(widest, _COLUMNS))[0] for _, peaks in chosen]
        levels = (torch.stack(rows).clamp_min(ends[0]).log() - low) / (high - low)
        sheet.text(0, top + LETTERS / 2 + 2, name, "start", name)
        top += LETTERS + 6
        sheet.bitmap(0, top, _WIDTH, height, heat(levels))
        for k, (layer, peaks) in enumerate(chosen):
            told = f"layer {layer}, {name}: at most {short(float(peaks.max()))}, in channel {int(peaks.argmax())}"
            sheet.area(0, top + k * height / len(layers), _WIDTH, height / len(layers), "hover", told)
        top += height + 2
    return sheet.svg()


def _scale(low: float, high: float) -> Html:
    """Which colour stands for how much."""
    sheet = Sheet(_WIDTH, 36, f"colours from {short(low)} to {short(high)}")
    sheet.text(0, 8, tick(float(f"{low:.2g}")), "start")
    sheet.text(_WIDTH / 2, 8, "largest |x|")
    sheet.text(_WIDTH, 8, tick(float(f"{high:.3g}")), "end")
    sheet.bitmap(0, 18, _WIDTH, 10, heat(torch.linspace(0, 1, 64, device="cpu")[None]))
    return tag("div", sheet.svg(), class_="scale")


def _profile(alt: str, before: SiteStatistics, after: SiteStatistics) -> Html:
    sheet = Sheet(_WIDTH, _HEIGHT, f"largest |x| of every channel, {alt}: {_told(before, after)}")
    both = [side.peaks for side in (before, after)]
    axis = Axis.decades([*both[0].tolist(), *both[1].tolist()])
    channels = len(both[0])
    _grid(sheet, axis)
    for peaks, kind in zip(both, SIDES):
        steps = functional.adaptive_max_pool1d(peaks[None], min(_STEPS, channels))[0].tolist()
        width = (_RIGHT - _LEFT) / len(steps)
        tops = [axis.place(x, _LOW, _TOP) for x in steps]
        corners = [(_LEFT + (k + edge) * width, y) for k, y in enumerate(tops) for edge in (0, 1)]
        sheet.fill([(_LEFT, _LOW), *corners, (_RIGHT, _LOW)], kind)
        sheet.line(corners, kind)
    edges = sorted({round(k * channels / _CHUNKS) for k in range(_CHUNKS + 1)})
    for first, end in pairwise(edges):
        told = ", ".join(f"{name} {short(float(x[first:end].max()))}" for x, name in zip(both, SIDES))
        left, right = (_LEFT + x * (_RIGHT - _LEFT) / channels for x in (first, end))
        sheet.area(left, _TOP, right - left, _LOW - _TOP, "hover", f"channels {first} to {end - 1}: at most {told}")
    sheet.text(_LEFT, _LOW + 14, "channel 0", "start")
    sheet.text(_RIGHT, _LOW + 14, f"{channels - 1}", "end")
    return sheet.svg()


def _told(before: SiteStatistics, after: SiteStatistics) -> str:
    return (
        f"largest {short(before.peak)} before and {short(after.peak)} after, "
        f"max/median {short(before.ratio)} before and {short(after.ratio)} after"
    )


def _extremes(entries: Sequence[tuple[int, float, float]], sides: tuple[str, str]) -> str:
    tops = (max((e[k] for e in entries if math.isfinite(e[k])), default=math.nan) for k in (1, 2))
    return ", ".join(f"at most {short(top)} {side}" for top, side in zip(tops, sides))

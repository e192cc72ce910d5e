"""A small sheet of SVG that becomes part of the page, and the axes that numbers are drawn along.

    values  ->  Axis  ->  Sheet  ->  <svg>

Colours are classes of the page's style sheet, so that one drawing serves light and dark. What a pointer rests on says
its numbers (``<title>``). Lengths are units of the sheet; a panel of 300 is at least about 270 pixels wide.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .markup import Html, tag
from .numbers import short

LETTERS = 12  # the size of letters
LETTER = 7.6  # how wide a letter of that size is at most, on average
_APART = 17.0  # what two numbers beside an axis are apart at least
Point = tuple[float, float]

# what colours stand for how much: nothing is nearly black, the most is nearly white
_RAMP = ((0, 0, 4), (61, 15, 109), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))


class Sheet:
    """A drawing of the given size in units. ``alt`` says what it shows to those who do not see it."""

    def __init__(self, width: float, height: float, alt: str) -> None:
        self._size, self._alt = (width, height), alt
        self._parts: list[Html] = []

    def text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "quiet") -> None:
        """Write one line whose middle has the height y."""
        at = {"x": _length(x), "y": _length(y + 0.36 * LETTERS), "text-anchor": anchor}
        self._parts.append(tag("text", text, class_=kind, **at))

    def line(self, points: Sequence[Point], kind: str) -> None:
        """Draw a line through the points."""
        path = " ".join(f"{_length(x)},{_length(y)}" for x, y in points)
        self._parts.append(tag("polyline", class_=f"line {kind}", points=path))

    def fill(self, points: Sequence[Point], kind: str) -> None:
        """Fill what the points go around."""
        path = " ".join(f"{_length(x)},{_length(y)}" for x, y in points)
        self._parts.append(tag("polygon", class_=f"fill {kind}", points=path))

    def area(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> None:
        """Draw a rectangle, on which a pointer shows ``tip``."""
        sizes = {"x": x, "y": y, "width": width, "height": height}
        self._add("rect", kind, tip, sizes)

    def dot(self, x: float, y: float, radius: float, kind: str, tip: str = "") -> None:
        """Draw a circle."""
        self._add("circle", kind, tip, {"cx": x, "cy": y, "r": radius})

    def diamond(self, x: float, y: float, radius: float, kind: str, tip: str = "") -> None:
        """Draw a square that stands on a corner."""
        corners = ((0, -radius), (radius, 0), (0, radius), (-radius, 0))
        path = " ".join(f"{_length(x + dx)},{_length(y + dy)}" for dx, dy in corners)
        self._parts.append(tag("polygon", *_title(tip), class_=kind, points=path))

    def bitmap(self, x: float, y: float, width: float, height: float, uri: str) -> None:
        """Stretch a picture over a rectangle."""
        sizes = {"x": x, "y": y, "width": width, "height": height}
        at = {name: _length(size) for name, size in sizes.items()}
        self._parts.append(tag("image", href=uri, preserveAspectRatio="none", **at))

    def svg(self) -> Html:
        """Return the element."""
        width, height = map(_length, self._size)
        about = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": self._alt}
        return tag("svg", *self._parts, **about)

    def _add(self, name: str, kind: str, tip: str, sizes: dict[str, float]) -> None:
        at = {key: _length(size) for key, size in sizes.items()}
        self._parts.append(tag(name, *_title(tip), class_=kind, **at))


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` along a line, evenly by what ``warp`` makes of them, and those beside it."""

    low: float
    high: float
    warp: Callable[[float], float]
    ticks: tuple[float, ...]

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two places; what is beyond the axis lies at its end."""
        low, high = self.warp(self.low), self.warp(self.high)
        share = (self.warp(min(max(value, self.low), self.high)) - low) / (high - low)
        return start + share * (end - start)

    def shown(self, start: float, end: float, apart: float = _APART) -> list[tuple[float, float]]:
        """The numbers to write and their places, none nearer to the one before than ``apart``."""
        found: list[tuple[float, float]] = []
        for value in self.ticks:
            at = self.place(value, start, end)
            if not found or abs(at - found[-1][1]) >= apart:
                found.append((value, at))
        return found

    @classmethod
    def decades(cls, numbers: Iterable[float], lowest: float | None = None) -> Axis:
        """A logarithmic axis of a decade and more, so that what is nearly equal looks so; linear between −1 and 1
        where a number is negative."""
        finite = [x for x in numbers if math.isfinite(x)]
        if any(x < 0 for x in finite):
            high, low = (10.0 ** max(0, _decade(max(each, 1.0))) for each in (max(finite), -min(finite)))
            powers = [10.0**e for e in range(_decade(max(high, low)) + 1)]
            ticks = (*(-p for p in reversed(powers) if p <= low), 0.0, *(p for p in powers if p <= high))
            return cls(-low, high, math.asinh, ticks)
        positive = [x for x in finite if x > 0] or [1.0]
        powers = [10.0**e for e in range(_decade(min(positive)) - 1, _decade(max(positive)) + 2)]
        steps = [m * p for p in powers for m in (1, 2, 5)]
        low = max(x for x in steps if x <= min(positive) * (1 + 1e-9)) if lowest is None else lowest
        high = next(x for x in steps if x >= max(max(positive), 10 * low) * (1 - 1e-9))
        ticks = tuple(x for x in (steps if high / low <= 50 else powers) if low <= x * (1 + 1e-9) and x <= high)
        return cls(low, high, lambda x: math.log10(max(x, low)), ticks)

    @classmethod
    def ratios(cls, numbers: Iterable[float]) -> Axis:
        """A logarithmic axis around ratios, which are most often a little above 1."""
        finite = [x for x in numbers if math.isfinite(x) and x > 0] or [1.0]
        low, high = min(finite), max(finite)
        room = 0.12 * (math.log(high) - math.log(low)) or 0.01
        low, high = low * math.exp(-room), high * math.exp(room)
        span = math.log(high / low)
        step = next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if span / s < 8), 0.0)
        if step:
            first = math.ceil(low / step)
            ticks = tuple(round(k * step, 4) for k in range(first, math.floor(high / step) + 1))
        else:
            every = (m * 10.0**e for e in range(-2, 9) for m in (1, 1.5, 2, 3, 5))
            ticks = tuple(x for x in every if low <= x <= high)
        return cls(low, high, math.log, ticks)

    @classmethod
    def sizes(cls, numbers: Sequence[float]) -> Axis:
        """An even axis around positive numbers, with round numbers beside it."""
        room = 0.12 * (max(numbers) - min(numbers)) or 0.1 * max(numbers)
        low, high = max(0.0, min(numbers) - room), max(numbers) + room
        steps = (m * 10.0**e for e in range(-6, 12) for m in (1, 2, 5))
        step = next(s for s in steps if (high - low) / s <= 6)
        ticks = tuple(k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1))
        return cls(low, high, lambda x: x, ticks)


def heat(values: Tensor) -> str:
    """Draw numbers from 0 to 1, float (rows, columns), as a picture with a pixel each: a data URI of PNG."""
    ramp = torch.tensor(_RAMP, dtype=torch.float32, device=values.device)
    at = values.clamp(0, 1).float() * (len(_RAMP) - 1)
    lower = at.floor().long().clamp_max(len(_RAMP) - 2)
    share = (at - lower)[..., None]
    colours = (ramp[lower] * (1 - share) + ramp[lower + 1] * share).round().to(torch.uint8)
    rows, columns = values.shape
    pixels = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in colours)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*each) for each in chunks)
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def tick(value: float) -> str:
    """A number beside an axis, in few letters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return short(value) if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _decade(value: float) -> int:
    """The power of ten at or above a number."""
    return math.ceil(math.log10(value) - 1e-9)


def _title(tip: str) -> list[Html]:
    return [tag("title", tip)] if tip else []


def _length(length: float) -> str:
    return f"{round(length, 1) + 0.0:g}"

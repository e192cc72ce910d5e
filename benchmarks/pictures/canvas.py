"""A sheet of SVG that brings its own ground, so that it can be read on a light and on a dark page.

Lengths are units of a sheet 400 wide. A phone of 360 pixels shows a unit as about 0.85 of a pixel, so no text is
smaller than 12 units. What is drawn has a class, and the style sheet says what colour that is, by day and by night.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH = 400
MARGIN = 14
SMALL, TEXT, TITLE = 12, 13, 16  # sizes of letters

INKS = {  # class of text and lines: by day, by night
    "ink": ("#1c2126", "#e6eaee"),
    "faint": ("#56606a", "#a9b3bd"),
    "r1": ("#175c96", "#86c2f3"),
    "r2": ("#156442", "#6fd6a5"),
    "r3": ("#63359a", "#c6a3f2"),
    "r4": ("#964809", "#f3b077"),
    "none": ("#56606a", "#a9b3bd"),
    "grid": ("#dde2e6", "#323a43"),
    "spinpass": ("#b8430b", "#ff9a62"),
    "llama": ("#3f464d", "#c3cad1"),
    "genai": ("#1d6ba3", "#74b9ea"),
    "olive": ("#6a3f94", "#c39ff0"),
    "autoround": ("#22713f", "#74cf95"),
}
GROUNDS = {  # class of areas: by day, by night
    "ground": ("#ffffff", "#14181d"),
    "panel": ("#f5f7f9", "#1c2229"),
    "bar": ("#2f7fc4", "#6fb2ee"),
    "r1": ("#d3e6f8", "#173f63"),
    "r2": ("#cfeddc", "#134530"),
    "r3": ("#e8dcf7", "#3c2a5b"),
    "r4": ("#fbe2cb", "#573110"),
    "none": ("#e9ecef", "#2b323a"),
}


class Canvas:
    """A sheet that grows downwards.

    Args:
        title: what the picture is, for those who do not see it.
        description: what it shows, in sentences.
    """

    def __init__(self, title: str, description: str) -> None:
        self._head = f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>"
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        kind: str = "ink",
        *,
        size: int = TEXT,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Write one line whose middle has the height y."""
        weight = ' font-weight="600"' if bold else ""
        at = f'x="{_number(x)}" y="{_number(y + 0.35 * size)}" font-size="{size}" text-anchor="{anchor}"{weight}'
        self._parts.append(f'<text class="{kind}" {at}>{escape(text)}</text>')

    def lines(self, x: float, y: float, lines: Sequence[str], kind: str = "faint", *, anchor: str = "start") -> float:
        """Write small lines below each other, the first with its middle at y. Return the y of a line behind them."""
        for number, line in enumerate(lines):
            self.text(x, y + 16 * number, line, kind, size=SMALL, anchor=anchor)
        return y + 16 * len(lines)

    def area(
        self, x: float, y: float, width: float, height: float, kind: str, *, round_: float = 4, edge: str = ""
    ) -> None:
        """Draw a rectangle with the given upper left corner; ``edge`` is the class of its line, none where empty."""
        line = f" edge-{edge}" if edge else ""
        sizes = {"x": x, "y": y, "width": width, "height": height, "rx": round_}
        at = " ".join(f'{name}="{_number(size)}"' for name, size in sizes.items())
        self._parts.append(f'<rect class="area-{kind}{line}" {at}/>')

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """Draw a dashed line around what belongs together."""
        right, low = x + width, y + height
        self.line([(x, y), (right, y), (right, low), (x, low), (x, y)], dashed=True)

    def line(
        self, points: Sequence[tuple[float, float]], kind: str = "faint", *, arrow: bool = False, dashed: bool = False
    ) -> None:
        """Draw a line through the points, with a head at its end where it is an arrow."""
        path = " L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        self._parts.append(f'<path class="line-{kind}" d="M{path}"{dashes}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            left, right = (x - 6 * dx - 4 * dy, y - 6 * dy - 4 * dx), (x - 6 * dx + 4 * dy, y - 6 * dy + 4 * dx)
            corners = " L".join(f"{_number(px)} {_number(py)}" for px, py in ((x, y), left, right))
            self._parts.append(f'<path class="{kind}" d="M{corners}Z"/>')

    def mark(self, x: float, y: float, shape: str, kind: str, name: str) -> None:
        """Draw a point as a ``circle``, ``square``, ``diamond``, ``up`` or ``down``; a pointer on it shows the name."""
        corners = {
            "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
            "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
            "up": ((0, -6), (6, 5), (-6, 5)),
            "down": ((0, 6), (6, -5), (-6, -5)),
        }
        label = f"<title>{escape(name)}</title>"
        if shape == "circle":
            self._parts.append(f'<circle class="{kind}" cx="{_number(x)}" cy="{_number(y)}" r="5">{label}</circle>')
        else:
            path = " L".join(f"{_number(x + dx)} {_number(y + dy)}" for dx, dy in corners[shape])
            self._parts.append(f'<path class="{kind}" d="M{path}Z">{label}</path>')

    def heading(self, text: str, *below: str) -> float:
        """Write what the picture is called, with small lines below it. Return the y behind them."""
        self.text(MARGIN, 24, text, size=TITLE, anchor="start", bold=True)
        return self.lines(MARGIN, 46, below) + 4

    def svg(self, height: float) -> str:
        """Return the sheet as a file of that height."""
        size = f'viewBox="0 0 {WIDTH} {_number(height)}" width="{_number(1.5 * WIDTH)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        ground = f'<rect class="area-ground" width="{WIDTH}" height="{_number(height)}" rx="8"/>'
        return "\n".join([head, self._head, _style(), ground, *self._parts, "</svg>", ""])


def _number(length: float) -> str:
    """Write a length to a tenth of a unit, which no eye sees, so that a picture is the same on every machine."""
    return f"{round(length, 1) + 0.0:g}"


def _style() -> str:
    font = "text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; }"
    night = "\n".join(_colours(1))
    return "\n".join(
        ["<style>", font, *_colours(0), f"@media (prefers-color-scheme: dark) {{\n{night}\n}}", "</style>"]
    )


def _colours(when: int) -> list[str]:
    inks = [
        f".{name} {{ fill: {both[when]}; }} .line-{name} {{ fill: none; stroke: {both[when]}; stroke-width: 1.4; }} "
        f".edge-{name} {{ stroke: {both[when]}; stroke-width: 1.2; }}"
        for name, both in INKS.items()
    ]
    return inks + [f".area-{name} {{ fill: {both[when]}; }}" for name, both in GROUNDS.items()]

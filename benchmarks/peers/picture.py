"""The table as a picture: megabytes against perplexity, a line along the files that no other is better than in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLOURS = {  # told apart by the colour-blind as well
    "spinpass": "#d9662a",
    "genai": "#2a7fba",
    "olive": "#7a4fa3",
    "autoround": "#3a9a5b",
    "llama": "#4a5058",
}
NAMES = {
    "spinpass": "spinpass",
    "genai": "GenAI's builder",
    "olive": "Olive",
    "autoround": "AutoRound",
    "llama": "llama.cpp",
}
MARKS = {"spinpass": "o", "genai": "s", "olive": "D", "autoround": "^", "llama": "v"}
_PLACES = ((6, 5), (6, -6))  # of a point's name beside it, in turns: neighbours lie close
_LEAST = 1e-3  # of a ratio above 1: what is nearer is drawn there


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (x, y) that no other is at most as large as in both, by x."""
    found: list[str] = []
    best = float("inf")
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < best:
            found.append(name)
            best = y
    return found


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write an SVG file of the rows that have a ratio, but for the model in floats."""
    drawn = [row for row in rows if "mean" in row and not row["row"].endswith((":float", ":fp32"))]
    points = {row["row"]: (row["bytes"] / 1e6, max(row["mean"] - 1, _LEAST)) for row in drawn}
    with matplotlib.rc_context({"svg.hashsalt": "peers", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(8.0, 5.0), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        line = [points[name] for name in front(points)]
        axes.step(*zip(*line), where="post", color="#9aa3ad", linewidth=1, zorder=1) if line else None
        for number, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
            tool, _, way = name.partition(":")
            label = NAMES[tool] if tool not in axes.get_legend_handles_labels()[1] else None
            axes.scatter(x, y, color=COLOURS[tool], marker=MARKS[tool], s=34, zorder=2, label=label)
            place = dict(xytext=_PLACES[number % len(_PLACES)], textcoords="offset points", va="center")
            axes.annotate(way, (x, y), **place, fontsize=7, color=COLOURS[tool])
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
        axes.legend(handles.values(), handles.keys(), frameon=False)
        axes.set(yscale="log", xlabel="MB", ylabel="perplexity above that of the float model", title=title)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.grid(color="#e3e6ea", linewidth=0.6)
        axes.set_axisbelow(True)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})

"""Pictures of a report, each for light and for dark pages, as data URIs of SVG: nothing is fetched.

Surfaces of |x| over tokens and channels as in QuaRot (arXiv 2404.00456, figure 1) and SpinQuant (2405.16406, figure 2),
bars of one number per layer before and after. Importing this module needs matplotlib.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor
from torch.nn import functional

from .numbers import short
from .statistics import SiteStatistics

BEFORE, AFTER = "#d9662a", "#2a7fba"  # told apart by the colour-blind as well
_TEXT, _GRID = "#202428", "#d5d9de"
_DARK_TEXT, _DARK_GRID = "#e3e6ea", "#4a5058"
_MAP = matplotlib.colormaps["coolwarm"]
_PANELS = 3  # in a row
_COLUMNS = 600  # of a heatmap
_DYNAMIC = 1e5  # the largest ratio of two peaks that its colours tell apart
Channels = Mapping[str, Sequence[tuple[int, Tensor, Tensor]]]  # panel -> (layer, peaks before, peaks after)
Bars = Mapping[str, Sequence[tuple[int, float, float]]]  # panel -> (layer, before, after)


@dataclass(frozen=True)
class Picture:
    """Two data URIs of one picture, and what it shows, in words."""

    light: str
    dark: str
    alt: str


def surfaces(title: str, before: SiteStatistics, after: SiteStatistics, axis: str) -> Picture:
    """Draw |x| of one site before and after on one scale, and the peak of every channel. ``axis``: what a vector is."""

    def draw(figure: Figure) -> None:
        top = float(max(before.surface.max(), after.surface.max()))
        for k, (name, side) in enumerate((("before", before), ("after", after))):
            _surface(figure.add_subplot(131 + k, projection="3d"), name, side, top, axis)
        _channels(figure.add_subplot(133), before, after)

    alt = (
        f"{title}: the largest activation is {short(before.peak)} before and {short(after.peak)} after rotation, "
        f"max/median {short(before.ratio)} before and {short(after.ratio)} after"
    )
    return _picture(draw, (12.0, 3.9), alt)


def bars(label: str, panels: Bars, *, lowest: float | None = None) -> Picture:
    """Draw two bars per layer, in a panel per kind of layer, on one logarithmic scale. What is not finite is left out.

    ``lowest`` is where the scale begins, by default at the power of ten below the smallest number. Where numbers are
    negative, the scale is linear between −1 and 1.
    """
    numbers = [x for values in panels.values() for entry in values for x in entry[1:] if math.isfinite(x)]
    columns = min(_PANELS, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        shared = None
        for k, (name, values) in enumerate(panels.items()):
            axes = shared = figure.add_subplot(rows, columns, k + 1, sharey=shared)
            _bars(axes, name, values)
            if k % columns == 0:
                axes.set_ylabel(label)
            else:
                axes.tick_params(labelleft=False)
        _logarithmic(figure.axes[0], numbers, lowest)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)

    alt = "; ".join(f"{name}: {_extremes(values)}" for name, values in panels.items())
    return _picture(draw, (4.0 * columns, 2.0 * rows + 0.4), f"{label}, per layer. {alt}")


def heatmaps(panels: Channels) -> Picture:
    """Draw the peak of every channel (columns) of every layer (rows), before and after, on one logarithmic scale.

    Where there are more channels than :data:`_COLUMNS`, a column shows the largest of several.
    """
    peaks = [peaks for layers in panels.values() for _, *sides in layers for peaks in sides]
    top = max(float(side.max()) for side in peaks) or 1.0
    bottom = max(min(float(side[side > 0].min()) if (side > 0).any() else top for side in peaks), top / _DYNAMIC)
    norm = LogNorm(min(bottom, top / 2), top)
    heights = [0.8 if len(layers) == 1 else 1.8 for layers in panels.values()]

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(len(panels), 2, height_ratios=heights)
        for row, (name, layers) in enumerate(panels.items()):
            for column, side in enumerate(("before", "after")):
                chosen = [(place, both[column]) for place, *both in layers]
                _heatmap(figure.add_subplot(grid[row, column]), f"{name}, {side}", chosen, norm)
        scale: Any = {"label": "max |x|", "location": "top", "aspect": 70, "format": FuncFormatter(_tick), "pad": 0.01}
        figure.colorbar(ScalarMappable(norm, "magma"), ax=figure.axes, **scale).minorticks_off()

    alt = "max |x| of every channel of every layer, before and after rotation: " + ", ".join(panels)
    return _picture(draw, (12.0, 0.7 + sum(heights)), alt)


def _surface(axes: Any, title: str, side: SiteStatistics, top: float, axis: str) -> None:
    rows, columns = side.surface.shape
    channels = numpy.arange(columns) * (len(side.peaks) / columns)
    vectors = numpy.arange(rows) * (side.surface_vectors / rows)
    x, y = numpy.meshgrid(channels, vectors)
    colors = _MAP(_highest_corner(side.surface).numpy() / (top or 1))
    style = {"facecolors": colors, "shade": False, "rstride": 1, "cstride": 1, "linewidth": 0, "antialiased": False}
    axes.plot_surface(x, y, side.surface.numpy(), rasterized=True, **style)
    axes.set_zlim(0, top or 1)
    axes.set_xlabel("channel")
    axes.set_ylabel(axis)
    axes.set_zlabel("|x|")
    axes.set_title(title, fontsize=9)
    axes.view_init(elev=24, azim=-58)
    for dimension in (axes.xaxis, axes.yaxis, axes.zaxis):
        dimension.set_pane_color((0.5, 0.5, 0.5, 0.08))
        dimension.set_major_locator(MaxNLocator(4, integer=dimension is not axes.zaxis))


def _heatmap(axes: Any, title: str, layers: Sequence[tuple[int, Tensor]], norm: LogNorm) -> None:
    widest = max(len(peaks) for _, peaks in layers)
    rows = [functional.adaptive_max_pool1d(peaks[None], min(widest, _COLUMNS))[0] for _, peaks in layers]
    values = torch.stack(rows).clamp_min(norm.vmin or 0.0).numpy()
    extent = (0, widest, len(layers) - 0.5, -0.5)
    axes.imshow(values, norm=norm, cmap="magma", aspect="auto", interpolation="nearest", extent=extent)
    axes.set_title(title, fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda row, _: str(layers[int(row)][0]) if 0 <= row < len(layers) else "")
    )
    if len(layers) == 1:
        axes.set_yticks([])


def _highest_corner(heights: Tensor) -> Tensor:
    """The highest corner of every face of a surface, so that its colour is that of the spike that it belongs to."""
    padded = functional.pad(heights[None], (0, 1, 0, 1), mode="replicate")
    highest: Tensor = functional.max_pool2d(padded, 2, stride=1)[0]
    return highest


def _channels(axes: Any, before: SiteStatistics, after: SiteStatistics) -> None:
    for side, color, name in ((before, BEFORE, "before"), (after, AFTER, "after")):
        axes.plot(side.peaks.tolist(), color=color, linewidth=0.8, label=name)
    _logarithmic(axes, [*before.peaks.tolist(), *after.peaks.tolist()], None)
    axes.set_xlabel("channel")
    axes.set_title("max |x| of each channel, all windows", fontsize=9)
    axes.legend(frameon=False)
    _frame(axes)


def _bars(axes: Any, name: str, values: Sequence[tuple[int, float, float]]) -> None:
    for offset, side, color, label in ((-0.2, 1, BEFORE, "before"), (0.2, 2, AFTER, "after")):
        shown = [(entry[0] + offset, entry[side]) for entry in values if math.isfinite(entry[side])]
        axes.bar([x for x, _ in shown], [y for _, y in shown], width=0.4, color=color, label=label)
    axes.set_title(name, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) == 1:
        axes.set_xticks([])
    _frame(axes)


def _logarithmic(axes: Any, numbers: Sequence[float], lowest: float | None) -> None:
    """Scale in whole decades, so that nearly equal bars look so; linear between −1 and 1 where some are negative."""
    positive = [x for x in numbers if x > 0]
    if not positive:
        return
    top = 10.0 ** math.ceil(math.log10(max(positive)) + 1e-9)
    if min(numbers, default=0.0) < 0:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(-(10.0 ** math.ceil(math.log10(max(1.0, -min(numbers))))), max(top, 1.0))
    else:
        axes.set_yscale("log")
        axes.set_ylim(10.0 ** math.floor(math.log10(min(positive))) if lowest is None else lowest, top)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_locator(NullLocator())


def _tick(value: float, _: int | None = None) -> str:
    return short(value)


def _frame(axes: Any) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _extremes(values: Sequence[tuple[int, float, float]]) -> str:
    sides = (("before", [v[1] for v in values]), ("after", [v[2] for v in values]))
    return ", ".join(f"at most {short(max(numbers))} {name}" for name, numbers in sides)


def _picture(draw: Callable[[Figure], None], size: tuple[float, float], alt: str) -> Picture:
    """Draw once: the dark picture is the light one with other colours of text and grid."""
    light = _drawn(draw, size)
    return Picture(_uri(light), _uri(light.replace(_TEXT, _DARK_TEXT).replace(_GRID, _DARK_GRID)), alt)


def _drawn(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    style: Any = {"font.size": 8, "text.parse_math": False, "svg.hashsalt": "spinpass", "grid.color": _GRID}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", dpi=140, transparent=True, metadata={"Date": None})
    return file.getvalue().decode("utf-8")


def _uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode('utf-8')).decode('ascii')}"

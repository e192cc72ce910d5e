"""One vector in two bases: with a channel that is far larger than the others, and after a Hadamard."""

from __future__ import annotations

import torch
from torch import Tensor

from spinpass import Rotation

from .canvas import MARGIN, SMALL, WIDTH, Canvas

CHANNELS, LARGE, BITS = 64, 20.0, 4
_HEIGHT, _WIDE = 96.0, WIDTH - 2 * MARGIN


def vector_in_two_bases() -> tuple[Tensor, Tensor]:
    """Return a vector of normal values, one of them 20, and the same vector after a Hadamard; both float64 (64,)."""
    x = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[23] = LARGE
    return x, x @ Rotation.create("hadamard", CHANNELS).matrix()


def rounding_step(x: Tensor) -> float:
    """Return the step of BITS-bit integers, symmetric around zero, whose range holds every value of the vector."""
    return float(x.abs().max()) / ((1 << BITS - 1) - 1)


def rounding_error(x: Tensor) -> float:
    """Return the norm of what rounding to those integers changes, divided by the norm of the vector."""
    step = rounding_step(x)
    rounded = torch.round(x / step) * step
    return float(torch.linalg.vector_norm(rounded - x) / torch.linalg.vector_norm(x))


def draw_outlier() -> str:
    """Draw the vector in both bases, with the steps that four bits have for it."""
    before, after = vector_in_two_bases()
    told = [f"{100 * rounding_error(x):.0f}%" for x in (before, after)]
    sheet = Canvas(
        "One vector in two bases",
        f"Above, one of {CHANNELS} channels is about 20 times as large as the others: {BITS} bits round most of them "
        f"to zero, and the error is {told[0]}. Below, after a Hadamard, all channels are alike, and the error is "
        f"{told[1]}.",
    )
    y = sheet.heading(
        "One vector in two bases",
        f"Each bar is the value of one of {CHANNELS} channels. The lines are the",
        f"{2**BITS - 1} values that {BITS}-bit integers can take here.",
    )
    y = _panel(sheet, y, "As the model made it", before, told[0])
    y = _panel(sheet, y, "After a Hadamard: the same length, spread evenly", after, told[1])
    return sheet.svg(y)


def _panel(sheet: Canvas, y: float, title: str, x: Tensor, error: str) -> float:
    sheet.text(MARGIN, y + 10, title, size=SMALL, anchor="start", bold=True)
    top = y + 24
    sheet.area(MARGIN, top, _WIDE, _HEIGHT, "panel", round_=0)
    peak = float(x.abs().max())
    steps = 2 ** (BITS - 1) - 1
    for k in range(-steps, steps + 1):
        at = top + _HEIGHT / 2 * (1 - 0.94 * k / steps)
        sheet.line([(MARGIN, at), (WIDTH - MARGIN, at)], "grid")
    bar = _WIDE / CHANNELS
    for k, value in enumerate(x.tolist()):
        length = 0.47 * _HEIGHT * abs(value) / peak
        middle = top + _HEIGHT / 2
        sheet.area(
            MARGIN + bar * (k + 0.15),
            middle - length if value > 0 else middle,
            0.7 * bar,
            max(length, 0.5),
            "bar",
            round_=0,
        )
    zeros = int((torch.round(x / rounding_step(x)) == 0).sum())
    facts = f"largest {peak:.1f}; {zeros} of {CHANNELS} become 0; error {error} of the length"
    sheet.text(MARGIN, top + _HEIGHT + 14, facts, "faint", size=SMALL, anchor="start")
    return top + _HEIGHT + 36

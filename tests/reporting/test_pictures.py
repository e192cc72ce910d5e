"""Pictures of numbers that are hard to draw: what is not finite, zeros, spikes."""

from __future__ import annotations

import base64
import io
import math

import pytest
import torch

pytest.importorskip("matplotlib")
from PIL import Image  # a dependency of matplotlib

from spinpass.reporting.pictures import bars, heatmaps, surfaces
from spinpass.reporting.statistics import Accumulator
from tests.support.pictures import check_picture


def test_bars_leave_out_what_is_not_finite_and_do_not_read_mathematics() -> None:
    made = bars("x", {"$\\frac{a}$": [(0, math.inf, 1.0), (1, math.nan, -2.0)], "b_c": [(0, 3.0, 4.0)]})
    assert "∞" in made.alt and "b_c" in made.alt
    assert made.light != made.dark
    same = bars("x", {"p": [(0, 1.0, 2.0)]})
    assert same == bars("x", {"p": [(0, 1.0, 2.0)]}), "the same numbers are the same file"


def test_a_surface_of_zeros_can_be_drawn() -> None:
    gathered = Accumulator(1)
    gathered.update(torch.zeros(1, 1))
    flat = surfaces("nothing", gathered.result(), gathered.result(), "token")
    assert check_picture(flat.light) == 0


def test_a_heatmap_has_two_panels_for_every_kind_of_layer() -> None:
    wide, narrow = torch.rand(5000), torch.rand(8)
    wide[4321] = 100
    made = heatmaps({"a": [(0, wide, wide), (4, wide[:4000], wide[:4000])], "$b_c$": [(0, narrow, narrow)]})
    assert check_picture(made.light) >= 4 and "$b_c$" in made.alt and made.light != made.dark


def test_a_surface_shows_its_spike_in_red() -> None:
    spiky, flat = Accumulator(60), Accumulator(60)
    x = torch.full((30, 60), 0.1)
    flat.update(x)
    x[15, 30] = 9
    spiky.update(x)
    made = surfaces("spike", spiky.result(), flat.result(), "token")
    assert check_picture(made.light) == check_picture(made.dark) == 2
    svg = base64.b64decode(made.light.split(",", 1)[1]).decode()
    reds = []
    for part in svg.split("data:image/png;base64,")[1:]:
        image = Image.open(io.BytesIO(base64.b64decode(part.split('"', 1)[0]))).convert("RGBA")
        reds.append(sum(n for n, (r, g, b, a) in image.getcolors(1 << 24) or [] if a == 255 and r > 150 > 2 * b))  # type: ignore[misc]
    assert reds[0] > 20 and reds[1] == 0

"""Small multiples: every number is where it belongs, nothing that is not finite is drawn, no panel is empty."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import torch

from spinpass.reporting.panels import brief, channel_lines, channel_maps, layer_panels
from spinpass.reporting.statistics import Accumulator, SiteStatistics


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")


def titles(markup: str) -> list[str]:
    return [each.text or "" for each in parsed(markup).iter("title")]


def test_a_kind_of_many_layers_is_a_panel_and_says_every_number() -> None:
    made = layer_panels("error", {"m.layers.*.up": [(k, 0.01 * (k + 1), 0.02) for k in range(5)]}, sides=("a", "b"))
    assert titles(made) == [f"layer {k}: a {0.01 * (k + 1):.3g}, b 0.02" for k in range(5)]
    root = parsed(made)
    assert [each.text for each in root.iter("figcaption")] == ["up"]
    heights = [float(dot.attrib["cy"]) for dot in root.iter("circle") if dot.attrib["class"] == "before"]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 5, "larger is higher"
    assert [span.text for span in root.iter("span")] == ["a", "b"]


def test_kinds_of_few_layers_are_rows() -> None:
    made = layer_panels("error", {"head": [(0, 4.0, 2.0)], "layers.*.up": [(0, 1.0, 3.0), (1, 1.0, 1.0)]})
    names = [each.text for each in parsed(made).iter("span")][2:]
    assert names == ["head", "up, layer 0", "up, layer 1"] and "figcaption" not in made
    assert titles(made)[0] == "before 4, after 2"


def test_what_is_not_finite_is_left_out() -> None:
    entries = [(0, 1.0, 1.0), (1, math.inf, 1.0), (2, math.nan, math.nan), (3, 2.0, -2.0), (4, 3.0, 4.0)]
    made = layer_panels("x", {"p": entries, "q": [(0, math.nan, math.inf)]})
    assert "nan" not in made and "q" not in [each.text for each in parsed(made).iter("figcaption")]
    assert len([d for d in parsed(made).iter("circle") if d.attrib["class"] == "before"]) == 3
    assert titles(made)[1] == "layer 1: before ∞, after 1" and len(titles(made)) == 4
    assert layer_panels("x", {"q": [(0, math.nan, math.inf)]}) == "" == layer_panels("x", {})


def test_channels_of_many_layers_are_a_map_of_their_own_for_each_side() -> None:
    wide, flat = torch.rand(5000), torch.ones(5000)
    wide[4321] = 100
    made = channel_maps({"a.*.b": [(k, wide, flat) for k in range(3)], "few": [(0, wide, flat)]})
    images = list(parsed(made).iter("image"))
    assert len(images) == 3, "the scale, before and after; a kind of one layer has no map"
    assert images[1].attrib["href"] != images[2].attrib["href"]
    assert titles(made)[0] == "layer 0, before: at most 100, in channel 4321"
    assert channel_maps({"few": [(0, wide, flat)]}) == "" == channel_maps({})


def test_zeros_can_be_drawn() -> None:
    nothing = torch.zeros(7)
    assert len(titles(channel_maps({"a": [(k, nothing, nothing) for k in range(3)]}))) == 6
    assert "nan" not in layer_panels("x", {"a": [(k, 0.0, 0.0) for k in range(3)]})


def gathered(x: torch.Tensor) -> SiteStatistics:
    accumulator = Accumulator(x.shape[-1])
    accumulator.update(x)
    return accumulator.result()


def test_a_line_of_channels_keeps_a_spike() -> None:
    x = torch.full((30, 1000), 0.1)
    flat = gathered(x)
    x[15, 777] = 9
    made = channel_lines({"input of m": (gathered(x), flat)})
    spike = next(each for each in titles(made) if "before 9" in each)
    first, last = (int(word) for word in spike.split(":")[0].split()[1::2])
    assert first <= 777 <= last and sum("before 9" in each for each in titles(made)) == 1
    lines = {each.attrib["class"]: each.attrib["points"] for each in parsed(made).iter("polyline")}
    tops = [min(float(point.split(",")[1]) for point in lines[f"line {side}"].split()) for side in ("before", "after")]
    assert tops[0] < tops[1] - 20 and channel_lines({}) == ""


def test_names_are_short_where_they_still_differ() -> None:
    assert brief(["model.layers.*.q", "head", "input of m.*.{a,b}"]) == ["q", "head", "input of {a,b}"]
    assert brief(["a.*.w", "b.*.w"]) == ["a.*.w", "b.*.w"]

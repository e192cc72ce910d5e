"""Size, quality and speed: which points are the best, which panels there are, and no name on another."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations

from spinpass.reporting.scatter import Measured, front, megabytes, pareto

CALLED = {"plain": "not quantized", "before": "original", "after": "rotated", "file": "exported file"}


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert front([(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (1.0, 4.0)]) == [1, 2, 0]


def points() -> list[Measured]:
    return [
        Measured("unquantized", "plain", 538_000_000, 1.0),
        Measured("w4", "before", 92_000_000, 1.29),
        Measured("w4", "after", 92_000_000, 1.05),
        Measured("int4", "file", 91_000_000, 1.06, 31.0),
        Measured("int8", "file", 142_000_000, 1.01, 19.0),
    ]


def test_every_point_says_its_numbers_and_has_its_kind() -> None:
    root = parsed(pareto(points(), CALLED))
    assert [each.text for each in root.iter("figcaption")] == ["size × quality", "speed × quality"]
    titles = [each.text for each in root.iter("title")]
    assert titles[:4] == [
        "unquantized, not quantized: 1.000 × perplexity, 538 MB",
        "w4, original: 1.29 × perplexity, 92 MB",
        "w4, rotated: 1.05 × perplexity, 92 MB",
        "int4, exported file: 1.06 × perplexity, 91 MB, 31 tokens per second",
    ]
    assert len(titles) == 5 + 2 and [each.text for each in root.iter("span")] == list(CALLED.values())
    kinds = [each.attrib["class"] for each in root.iter() if each.attrib.get("class", "").startswith("mark")]
    assert kinds.count("mark file") == 4
    faster = [float(p.attrib["points"].split(",")[0]) for p in root.iter("polygon")][2:]
    assert faster[0] > faster[1], "faster is further to the right"


def test_panels_without_a_difference_are_left_out() -> None:
    assert len(list(parsed(pareto(points()[:4], CALLED)).iter("svg"))) == 1, "one file alone shows no speed"
    assert pareto(points()[:1], CALLED) == "" == pareto([Measured("broken", "after", 1, math.inf)], CALLED)
    same = [Measured("a", "after", 5, 1.1), Measured("b", "after", 5, 1.1)]
    assert pareto(same, CALLED) == ""


def test_names_cover_nothing() -> None:
    crowd = [Measured(f"scheme-{k}", "after", 92_000_000 + k, 1.05 + k / 1e4) for k in range(30)]
    names = [
        each for each in parsed(pareto([*points()[:3], *crowd], CALLED)).iter("text") if each.attrib["class"] == "name"
    ]
    assert 2 <= len(names) < 20 and len(names) == len({each.text for each in names})
    places = [(float(each.attrib["x"]), float(each.attrib["y"])) for each in names]
    assert all(abs(a[1] - b[1]) >= 14 or abs(a[0] - b[0]) > 40 for a, b in combinations(places, 2))


def test_megabytes() -> None:
    assert [megabytes(size) for size in (14_100, 5_250_000, 92_400_000, 1_234_000_000)] == [
        "0.0141 MB",
        "5.25 MB",
        "92 MB",
        "1,234 MB",
    ]

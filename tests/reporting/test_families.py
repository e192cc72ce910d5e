"""Layers that differ only in their number stand together."""

from __future__ import annotations

from spinpass.reporting.families import families, joined, label, worst_of_each
from tests.support import reports


def test_families() -> None:
    assert joined(["m.0.q.weight", "m.0.k.weight"]) == "m.0.{q,k}" and joined(["a.b.weight", "c"]) == "a.b, c"
    found = families([("m.3.x", (1.0, 2.0)), ("m.7.x", (3.0, 4.0)), ("head", (5.0, 6.0))])
    assert found == {"m.*.x": [(3, 1.0, 2.0), (7, 3.0, 4.0)], "head": [(0, 5.0, 6.0)]}
    experts = families((f"m.0.e.{k}.w", (1.0, 1.0)) for k in range(3))
    assert [place for place, *_ in experts["m.*.e.*.w"]] == [0, 1, 2], "several of one layer stand side by side"


def test_the_worst_of_each_family_comes_first() -> None:
    report = reports.report()
    worst = worst_of_each(report.pairs, 3)
    ratios = [p.before.ratio for p in worst]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] == max(p.before.ratio for p in report.pairs)
    assert len({label(p).replace("0", "1") for p in worst}) == 3

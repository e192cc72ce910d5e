"""The page as a real browser shows it, at the widths of a phone, a tablet and a desk, by day and by night.

``SPINPASS_SCREENSHOTS=FOLDER`` keeps the pictures, to look at. ``SPINPASS_BROWSER=required`` fails where no browser is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.screenshots import browser
from spinpass.reporting import SavedReport, compare_reports, page, write_comparison
from tests.support import reports

REQUIRED = os.environ.get("SPINPASS_BROWSER") == "required"
GROUNDS = {False: (255, 255, 255), True: (20, 23, 26)}  # --page of page.css
SIDES = {False: ((184, 80, 28), (31, 109, 166)), True: ((240, 147, 95), (109, 179, 230))}  # --before, --after

pytestmark = pytest.mark.skipif(not browser.installed() and not REQUIRED, reason=browser.NONE)


def faults(found: list[dict[str, Any]]) -> list[str]:
    """What is wrong at any width, with all details folded or not."""
    return [
        f"{state} at {width['folded']['width']}: {fault}" for width in found for state, facts in width.items() for fault in facts["faults"]
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read_at_every_width(dark: bool, tmp_path: Path) -> None:
    from PIL import Image

    kept = Path(os.environ.get("SPINPASS_SCREENSHOTS", tmp_path)) / f"report-{'dark' if dark else 'light'}"
    page.write_page(reports.deep(), tmp_path / "report.html")
    found = browser.shown(tmp_path / "report.html", kept, dark=dark)
    assert not faults(found)
    for width, facts in zip(browser.WIDTHS, found, strict=True):
        for state in facts.values():
            assert state["width"] == width and state["overflow"] == 0 and state["dark"] == dark
            assert state["scripts"] == state["fetched"] == 0 and not state["hollow"] and state["drawings"] > 30
        assert facts["unfolded"]["labels"] > facts["folded"]["labels"] > 200
        image = Image.open(f"{kept}-{width}.png").convert("RGB")
        colours: Any = {colour: count for count, colour in image.getcolors(1 << 24) or []}
        assert image.width == width and max(colours, key=colours.__getitem__) == GROUNDS[dark]
        assert all(colours.get(colour, 0) > 500 for colour in SIDES[dark]), "both sides are painted"


def test_a_comparison_can_be_read(tmp_path: Path) -> None:
    for name in ("a.json", "another-report-with-a-long-name.json"):
        page.save_report(reports.deep(), tmp_path / name)
    both = compare_reports(*map(SavedReport.read, sorted(tmp_path.glob("*.json"))))
    write_comparison(both, tmp_path / "both.html")
    found = browser.shown(tmp_path / "both.html", tmp_path / "both", dark=False, widths=[360, 1280])
    assert not faults(found) and all(facts["overflow"] == 0 and not facts["hollow"] for each in found for facts in each.values())


def test_a_page_that_cannot_be_read_is_seen(tmp_path: Path) -> None:
    """One text on another, one out of the page, one out of its drawing, one too small, and a section without a part."""
    text = page.render(reports.report())
    first = re.search(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>[^<]+</text>', text)
    assert first is not None
    spoiled = text.replace(
        first.group(),
        first.group()
        + f'<text x="{first[1]}" y="{first[2]}">covering</text><text x="330" y="100">cut at the edge</text>'
        + '<text x="200" y="200" style="font-size: 5px">tiny</text>',
        1,
    )
    wide = '<p style="position: absolute; left: 300px; width: 20rem">far to the right</p><section id="hollow"><h2>Hollow</h2></section></main>'
    (tmp_path / "spoiled.html").write_text(spoiled.replace("</main>", wide), encoding="utf-8")
    (found,) = browser.shown(tmp_path / "spoiled.html", tmp_path / "spoiled", dark=False, widths=[360])
    seen = "\n".join(faults([found]))
    for what in ("covers | ", "cut at the edge | leaves its drawing", "tiny | is ", "far to the right | leaves the page"):
        assert what in seen, seen
    assert re.search(r"covering \| covers|covers \| covering", seen) and found["folded"]["hollow"] == ["hollow"]
    assert found["folded"]["overflow"] > 0

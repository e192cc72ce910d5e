"""The page as a real browser shows it. ``SPINPASS_SCREENSHOTS=FOLDER`` keeps the pictures, to look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from PIL import Image  # a dependency of matplotlib

from spinpass.reporting import page, pictures
from tests.support import browser, reports

BROWSERS = browser.found()
LIGHT, DARK = (255, 255, 255), (20, 23, 26)  # --page of page.css

pytestmark = pytest.mark.skipif(not BROWSERS, reason=browser.NONE)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write_page(reports.report(), path)
    return path


@pytest.fixture(scope="module", params=[(name, dark) for name in BROWSERS for dark in (False, True)], ids=str)
def shot(request: pytest.FixtureRequest, html: Path) -> tuple[Image.Image, bool, Any]:
    name, dark = request.param
    image = Path(os.environ.get("SPINPASS_SCREENSHOTS", html.parent)) / f"{name}-{'dark' if dark else 'light'}.png"
    facts = BROWSERS[name](html, image, dark)
    return Image.open(image).convert("RGB"), dark, facts


def colours(image: Image.Image) -> dict[tuple[int, int, int], int]:
    found = image.getcolors(image.width * image.height) or []
    return {colour: count for count, colour in found}  # type: ignore[misc]


def test_the_background_is_that_of_the_colour_scheme(shot: Any) -> None:
    image, dark, _ = shot
    assert image.size[0] == browser.WIDTH and image.size[1] >= browser.HEIGHT
    counts = colours(image)
    assert max(counts, key=counts.__getitem__) == (DARK if dark else LIGHT)


def test_the_bars_are_painted_in_both_colours(shot: Any) -> None:
    counts = colours(shot[0])
    for colour in (pictures.BEFORE, pictures.AFTER):
        rgb = tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))
        assert counts.get(rgb, 0) > 2000, colour  # type: ignore[arg-type]


def test_text_is_painted_across_the_page(shot: Any) -> None:
    image, dark, _ = shot
    ink = image.convert("L").point(lambda level: 255 * (level > 150 if dark else level < 110))  # type: ignore[operator]
    left, top, right, bottom = ink.getbbox() or (0, 0, 0, 0)
    assert left < 60 and right > browser.WIDTH - 60 and top < 90 and bottom > image.height - 200


def test_the_browser_finds_nothing_wrong(shot: Any) -> None:
    _, dark, facts = shot
    if facts is None:
        pytest.skip("this browser only takes pictures")
    assert facts["dark"] == dark and facts["overflow"] == 0 and facts["scripts"] == 0 and facts["fetched"] == 0
    assert len(facts["images"]) >= 8
    for width, is_light, alt in facts["images"]:
        assert width > 400 and is_light != dark and "before" in alt


def test_a_damaged_picture_does_not_go_unseen(html: Path, tmp_path: Path) -> None:
    if "qt" not in BROWSERS:
        pytest.skip("these browsers only take pictures")
    damaged = tmp_path / "damaged.html"
    text = html.read_text(encoding="utf-8")
    damaged.write_text(
        text.replace('<img src="data:image/svg+xml;base64,', '<img src="data:image/svg+xml;base64,AAAA', 1)
    )
    facts = BROWSERS["qt"](damaged, tmp_path / "damaged.png", False)
    assert facts is not None
    broken = [width for width, *_ in facts["images"] if width < 400]
    assert len(broken) == 1

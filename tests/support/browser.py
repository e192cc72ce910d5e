"""Pages in a real browser without a screen: Chromium or Chrome, Firefox, or QtWebEngine (which is Chromium)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, Any] | None  # what the page says of itself, where the browser can be asked
Browser = Callable[[Path, Path, bool], Facts]
WIDTH, HEIGHT = 1200, 2400
_SECONDS = 240
_CHROMIUMS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
)
NONE = "no browser: neither Chromium, Chrome or Firefox on the PATH nor PySide6-WebEngine (pip install 'spinpass[browser]')"


def found() -> dict[str, Browser]:
    """By name, every browser that is here. Each takes a page, the image to write, and whether to prefer dark."""
    here: dict[str, Browser] = {}
    if importlib.util.find_spec("PySide6") and importlib.util.find_spec("PySide6.QtWebEngineWidgets"):
        here["qt"] = _qt
    chromium = next(filter(None, map(shutil.which, _CHROMIUMS)), None)
    if chromium:
        here["chromium"] = lambda page, image, dark: _chromium(chromium, page, image, dark)
    firefox = shutil.which("firefox")
    if firefox:
        here["firefox"] = lambda page, image, dark: _firefox(firefox, page, image, dark)
    return here


def _qt(page: Path, image: Path, dark: bool) -> Facts:
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={0 if dark else 1}"
    module = [sys.executable, "-m", "tests.support.qt_browser", page.resolve(), image.resolve(), WIDTH]
    done = _run(module, {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags})
    facts: Facts = json.loads(done)
    return facts


def _chromium(command: str, page: Path, image: Path, dark: bool) -> Facts:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run([command, *options, scheme, f"--screenshot={image}", page.resolve().as_uri()], {})
    return None


def _firefox(command: str, page: Path, image: Path, dark: bool) -> Facts:
    profile = image.with_suffix(".profile")
    profile.mkdir()
    (profile / "user.js").write_text(
        f'user_pref("layout.css.prefers-color-scheme.content-override", {0 if dark else 1});'
    )
    window = ["--headless", f"--window-size={WIDTH},{HEIGHT}"]
    _run([command, "--profile", profile, *window, "--screenshot", image, page.resolve().as_uri()], {})
    return None


def _run(command: list[Any], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],  # where the module is found
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

"""A page in a real browser without a screen: QtWebEngine, which is Chromium, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.imports import ROOT

WIDTHS = (360, 800, 1280)
"""A phone, a tablet, a desk."""

NONE = "no browser: make browser installs one (PySide6-WebEngine)"
_SECONDS = 240


def installed() -> bool:
    """Whether there is a browser."""
    return bool(importlib.util.find_spec("PySide6") and importlib.util.find_spec("PySide6.QtWebEngineWidgets"))


def shown(page: Path, pictures: Path, *, dark: bool, widths: Sequence[int] = WIDTHS) -> list[dict[str, Any]]:
    """Show a page at several widths.

    Args:
        page: the HTML file.
        pictures: the begin of the names of the pictures, PICTURES-WIDTH.png, of the whole page.
        dark: which colours are preferred.
        widths: in pixels.

    Returns:
        For each width what the page says of itself (``facts.js``), ``folded`` and with all details ``unfolded``.

    Raises:
        RuntimeError: the browser failed; the message has what it said.
    """
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = f"--no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1 {scheme}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.screenshots.qt",
            str(page.resolve()),
            str(pictures.resolve()),
            *map(str, widths),
        ],
        env=os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the browser ended with {done.returncode}: {done.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    if len(found) < len(widths):
        raise RuntimeError(f"the page was painted at {len(found)} of {len(widths)} widths only: {done.stderr.strip()}")
    return found

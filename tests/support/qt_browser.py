"""``python -m tests.support.qt_browser PAGE IMAGE WIDTH``: the whole page as QtWebEngine, which is Chromium, shows it.

Prints what the page says of itself as JSON. Needs PySide6-WebEngine; the platform and the colour scheme come from the
environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtGui import QImage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

FACTS = """JSON.stringify({
    height: document.documentElement.scrollHeight,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    background: getComputedStyle(document.body).backgroundColor,
    images: [...document.images].map(i => [i.naturalWidth, i.currentSrc === i.src, i.alt]),
    scripts: document.scripts.length,
    fetched: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length,
})"""
_LAID_OUT, _AGAIN, _LATEST = 300, 700, 120_000  # milliseconds


def main(page: Path, image: Path, width: int) -> None:
    """Load, make the window as tall as the page, wait until two looks in a row show the same, save."""
    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(width, 900)
    facts: list[str] = []
    looks: list[QImage] = []

    def measure() -> None:
        view.page().runJavaScript(FACTS, 0, fit)

    def fit(found: Any) -> None:
        facts.append(str(found))
        view.resize(width, json.loads(facts[0])["height"])
        QTimer.singleShot(_AGAIN, look)

    def look() -> None:
        looks.append(view.grab().toImage())
        if len(looks) > 1 and looks[-1] == looks[-2] and painted(looks[-1]):
            looks[-1].save(str(image))
            app.quit()
        QTimer.singleShot(_AGAIN, look)

    view.loadFinished.connect(lambda _: QTimer.singleShot(_LAID_OUT, measure))
    view.load(QUrl.fromLocalFile(str(page.resolve())))
    view.show()
    QTimer.singleShot(_LATEST, app.quit)
    app.exec()
    print(facts[0])


def painted(image: QImage) -> bool:
    """More than a few colours, in the first and in the last part of the page."""
    height, part = image.height(), 900
    rows = ([*range(0, part, 7)], [*range(height - part, height, 7)])
    return all(len({image.pixel(x, y) for y in ys for x in range(0, image.width(), 7)}) > 5 for ys in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

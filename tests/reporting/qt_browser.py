"""``python -m tests.reporting.qt_browser PAGE IMAGE WIDTH``: the whole page as QtWebEngine, which is Chromium, shows it.

Prints what the page says of itself as JSON. Needs PySide6-WebEngine; the platform and the colour scheme come from the
environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, QUrl
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
_LAID_OUT, _PAINTED, _LATEST = 300, 1500, 90_000  # milliseconds


def main(page: Path, image: Path, width: int) -> None:
    """Load, make the window as tall as the page, wait until it is painted, save."""
    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(width, 900)
    facts: list[Any] = []

    def measure() -> None:
        view.page().runJavaScript(FACTS, 0, fit)

    def fit(found: Any) -> None:
        facts.append(found)
        view.resize(width, int(str(found).split('"height":')[1].split(",")[0]))
        QTimer.singleShot(_PAINTED, save)

    def save() -> None:
        view.grab().save(str(image))
        app.quit()

    view.loadFinished.connect(lambda _: QTimer.singleShot(_LAID_OUT, measure))
    view.load(QUrl.fromLocalFile(str(page.resolve())))
    view.show()
    QTimer.singleShot(_LATEST, app.quit)
    app.exec()
    print(facts[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

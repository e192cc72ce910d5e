"""``python -m benchmarks.screenshots.qt PAGE PICTURES WIDTH…``: a page as QtWebEngine, which is Chromium, shows it.

Saves the whole page at each width as ``PICTURES-WIDTH.png``, and prints as JSON what the page says of itself there.
Needs PySide6-WebEngine; the platform and the colour scheme come from the environment (:mod:`.browser`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtGui import QImage
from PySide6.QtWebEngineCore import QWebEngineSettings
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

FACTS = Path(__file__).with_name("facts.js").read_text(encoding="utf-8")
_FOLD = "document.querySelectorAll('details').forEach(each => { each.open = %s })"
_LAID_OUT, _AGAIN, _LATEST = 200, 400, 200_000  # milliseconds
_HEIGHT = 900  # of the window before the page says how tall it is


class Photographer:
    """Shows a page at one width after the other. At each it asks the page, takes a picture, and asks it unfolded.

    Args:
        page: the HTML file.
        pictures: where pictures go; each gets the width added to its name.
        widths: of the window, in pixels.
    """

    def __init__(self, page: Path, pictures: Path, widths: list[int]) -> None:
        self.app = QApplication(sys.argv[:1])
        self.found: list[dict[str, Any]] = []
        self._pictures, self._widths, self._looks = pictures, widths, list[QImage]()
        self._view = QWebEngineView()
        self._view.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
        self._view.loadFinished.connect(lambda _: self._next())
        self._view.resize(widths[0], _HEIGHT)
        self._view.load(QUrl.fromLocalFile(str(page.resolve())))
        self._view.show()

    def _next(self) -> None:
        if len(self.found) == len(self._widths):
            self.app.quit()
            return
        self._looks.clear()
        self._view.resize(self._widths[len(self.found)], _HEIGHT)
        self._after(_LAID_OUT, lambda: self._ask(self._fit))

    def _fit(self, facts: dict[str, Any]) -> None:
        self.found.append({"folded": facts})
        self._view.resize(self._view.width(), facts["height"])
        self._after(_AGAIN, self._look)

    def _look(self) -> None:
        """Save the page as soon as two looks in a row show the same."""
        self._looks.append(self._view.grab().toImage())
        if len(self._looks) > 1 and self._looks[-1] == self._looks[-2] and painted(self._looks[-1]):
            self._looks[-1].save(f"{self._pictures}-{self._view.width()}.png")
            self._run(_FOLD % "true", lambda _: self._after(_LAID_OUT, lambda: self._ask(self._unfolded)))
        else:
            self._after(_AGAIN, self._look)

    def _unfolded(self, facts: dict[str, Any]) -> None:
        self.found[-1]["unfolded"] = facts
        self._run(_FOLD % "false", lambda _: self._next())

    def _ask(self, then: Callable[[dict[str, Any]], None]) -> None:
        self._run(FACTS, lambda found: then(json.loads(found)))

    def _run(self, script: str, then: Callable[[Any], None]) -> None:
        self._view.page().runJavaScript(script, 0, then)

    def _after(self, milliseconds: int, then: Callable[[], None]) -> None:
        QTimer.singleShot(milliseconds, then)


def painted(image: QImage) -> bool:
    """Whether there are more than a few colours in the first and in the last part of the page."""
    height, part = image.height(), min(_HEIGHT, image.height())
    rows = ([*range(0, part, 7)], [*range(height - part, height, 7)])
    return all(len({image.pixel(x, y) for y in ys for x in range(0, image.width(), 7)}) > 5 for ys in rows)


def main(page: Path, pictures: Path, widths: list[int]) -> None:
    """Show the page at every width, and print what it says."""
    shown = Photographer(page, pictures, widths)
    QTimer.singleShot(_LATEST, shown.app.quit)
    shown.app.exec()
    print(json.dumps(shown.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(each) for each in sys.argv[3:]])

"""Write the pictures of the documentation: ``python -m benchmarks.pictures [FOLDER]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.imports import ROOT

from .anatomy import draw_axes, draw_online_rotations, draw_rotations
from .outlier import draw_outlier
from .pareto import draw_pareto
from .passes import draw_pipeline

HOME = ROOT / "docs" / "pictures"
PICTURES: dict[str, Callable[[], str]] = {
    "pipeline": draw_pipeline,
    "axes": draw_axes,
    "rotations": draw_rotations,
    "rotations-online": draw_online_rotations,
    "outlier": draw_outlier,
    "pareto": draw_pareto,
}
"""By the name of the file, what draws it."""


def main(folder: Path = HOME) -> None:
    """Draw all pictures into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        path = folder / f"{name}.svg"
        path.write_text(draw(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""One row of the table: a file made, scored on every text, kept on the disk, or the error that there is instead."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sources import digest
from spinpass.errors import first_line
from spinpass.evaluation import Comparison, Scorer, Windows, compare
from spinpass.progress import Steps

from .environments import Cost
from .makers import Made, Workshop, make, tool_of
from .scoring import scorer, size
from .stored import stored

_KEPT = "row.json"


@dataclass(frozen=True)
class Row:
    """A file: where it lies, how many bytes it has, what its weights are, how it compares by text, what it took."""

    name: str
    made: Made
    bytes: int
    stored: str
    compared: Mapping[str, Comparison]

    def to_dict(self, weights: int) -> dict[str, Any]:
        """The JSON-able form; divergence and agreement are means over texts."""
        ratios = {text: found.ratio for text, found in self.compared.items()}
        errors = {text: found.ratio * found.change.error for text, found in self.compared.items()}
        cost = self.made.cost or Cost(math.nan, 0)
        return {
            "row": self.name,
            "path": str(self.made.path),
            "asked": self.made.note,
            "stored": self.stored,
            "bytes": self.bytes,
            "bits_per_weight": 8 * self.bytes / weights,
            "ratios": ratios,
            "errors": errors,
            "mean": math.exp(statistics.fmean(map(math.log, ratios.values()))),
            "kl": statistics.fmean(found.divergence for found in self.compared.values()),
            "agreement": statistics.fmean(found.agreement for found in self.compared.values()),
            "cpu_minutes": None if math.isnan(cost.cpu_minutes) else cost.cpu_minutes,
            "peak_bytes": cost.peak_bytes or None,
        }


@dataclass(frozen=True)
class Bench:
    """What all rows share: the tools, the model to compare with, the windows of each text, and a place for the files.

    A row that is there already is taken as it is, unless ``again``, or the weights, the windows, a version of its tool
    or, for rows of spinpass, its code are others now. ``files``: by row, those that need not be made.
    """

    shop: Workshop
    float: Scorer
    cut: Mapping[str, Windows]
    folder: Path
    again: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)

    def row(self, name: str, steps: Steps) -> dict[str, Any]:
        """Make, score and keep a row; where that fails, a row with ``error``."""
        steps.start(name)
        try:
            return self._row(name, steps)
        except (Exception, SystemExit) as error:  # a tool raises whatever it raises, and the table goes on
            return {"row": name, "error": first_line(error) or type(error).__name__}

    def _row(self, name: str, steps: Steps) -> dict[str, Any]:
        versions = self.shop.environments.versions(tool_of(name)) if tool_of(name) else {}
        folder = (self.folder / name.replace(":", "-").replace("/", "-")).resolve()
        key, kept = self.key(name, versions), folder / _KEPT
        if kept.is_file() and not self.again:
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if found["key"] == key:
                return found | {"stored": stored(Path(found["path"]))}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made = Made(self.files[name]) if name in self.files else make(name, folder, self.shop)
        found = self._scored(name, made, steps).to_dict(self.shop.source.weights) | {"versions": versions, "key": key}
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return found

    def _scored(self, name: str, made: Made, steps: Steps) -> Row:
        its, compared = scorer(made.path, self.shop), {}
        for text, windows in self.cut.items():
            compared[text] = compare(self.float, its, windows, steps.start(f"{name}, {text}"))
        return Row(name, made, size(made.path), stored(made.path), compared)

    def key(self, name: str, versions: Mapping[str, str]) -> str:
        """Twelve digits that change with what a row depends on."""
        code = "" if tool_of(name) else digest("spinpass.cli.export", within=("spinpass",))
        file = str(self.files.get(name, ""))
        about = [name, self.shop.source.digest, {n: list(w) for n, w in self.cut.items()}, dict(versions), code, file]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]

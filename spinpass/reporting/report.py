"""What a report says, as values: every number of the page, before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spinpass.evaluation import Change, Comparison, Perplexity, Speed, change
from spinpass.planning import RotationPlan
from spinpass.values import titled

from .activations import Pair, Unpaired

DOCUMENT, LAYOUT = "report", 1  # of the document that --json prints


@dataclass(frozen=True)
class Origin:
    """How a report came about.

    ``date``: in ISO 8601, with the zone; ``command``: what was typed, empty from Python; ``text``: a hash of the tokens
    that were scored, by which two reports know that they can be compared window by window; ``threads``: those that
    PyTorch computed with; ``versions``: those of the packages.
    """

    date: str
    command: str
    text: str
    threads: int
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "date": self.date,
            "command": self.command,
            "text": self.text,
            "threads": self.threads,
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class ExportedFile:
    """An exported folder, run by the runtime that it is for.

    ``comparison``: with the original unquantized program; ``bytes``: those of the model's files; ``runtime``: its name;
    ``speed``: medians over a few turns on this machine.
    """

    comparison: Comparison
    bytes: int
    runtime: str
    speed: Speed

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        found = {k: v for k, v in self.comparison.to_dict().items() if k != "before"}
        return {"bytes": self.bytes, "runtime": self.runtime} | found | self.speed.to_dict()


@dataclass(frozen=True)
class SchemeSide:
    """One program under one scheme.

    ``comparison``: with the original unquantized program; ``errors``: the relative error of every weight, by FQN;
    ``bytes``: those of all constants.
    """

    comparison: Comparison
    errors: Mapping[str, float]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        found = self.comparison.to_dict()
        return {"bytes": self.bytes, "errors": dict(self.errors)} | {k: v for k, v in found.items() if k != "before"}


@dataclass(frozen=True)
class Scheme:
    """One scheme, applied to the original and to the rotated program."""

    original: SchemeSide
    rotated: SchemeSide

    @property
    def gain(self) -> Change:
        """The change of the loss by rotation, under the scheme, paired by window."""
        return change(self.original.comparison.after, self.rotated.comparison.after)

    def errors(self) -> dict[str, tuple[float, float]]:
        """The relative errors (original, rotated) of every weight; nan where only the other program has it."""
        sides = self.original.errors, self.rotated.errors
        names = dict.fromkeys([*sides[0], *sides[1]])
        return {name: (sides[0].get(name, math.nan), sides[1].get(name, math.nan)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        gain = {"rotated_over_original": math.exp(self.gain.mean), "standard_error": None}
        if not math.isnan(self.gain.error):
            gain["standard_error"] = math.exp(self.gain.mean) * self.gain.error
        return {"original": self.original.to_dict(), "rotated": self.rotated.to_dict()} | gain


@dataclass(frozen=True)
class Report:
    """A model before and after rotation.

    ``left``: linear layers that were not measured, by node of the original program, and why; ``unquantized``: the
    rotated program compared with the original; ``files``: exported folders, by what they are called; ``bytes``: those
    of the constants, before and after; ``seconds``: the time of every step; ``certificate``: as
    :meth:`spinpass.Certificate.to_dict`, None where it was switched off.
    """

    model: str
    windows: int
    length: int
    plan: RotationPlan
    certificate: Mapping[str, Any] | None
    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    left: Mapping[str, str]
    unquantized: Comparison
    schemes: Mapping[str, Scheme]
    files: Mapping[str, ExportedFile]
    bytes: tuple[int, int]
    seconds: Mapping[str, float]
    origin: Origin

    def perplexities(self) -> Iterator[tuple[str, str, Perplexity]]:
        """Every perplexity, as (scheme or "", original or rotated, perplexity)."""
        yield "", "original", self.unquantized.before
        yield "", "rotated", self.unquantized.after
        for name, scheme in self.schemes.items():
            yield name, "original", scheme.original.comparison.after
            yield name, "rotated", scheme.rotated.comparison.after

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        document = {
            "model": self.model,
            "windows": self.windows,
            "length": self.length,
            "activations": {
                "sites": [pair.to_dict() for pair in self.pairs],
                "unpaired": [unpaired.to_dict() for unpaired in self.unpaired],
                "not_measured": dict(self.left),
            },
            "unquantized": self.unquantized.to_dict(),
            "schemes": {name: scheme.to_dict() for name, scheme in self.schemes.items()},
            "plan": self.plan.to_dict(matrices=False),
            "certificate": self.certificate,
            "files": {name: file.to_dict() for name, file in self.files.items()},
            "bytes": dict(zip(("before", "after"), self.bytes)),
            "seconds": dict(self.seconds),
            "origin": self.origin.to_dict(),
        }
        return titled(DOCUMENT, LAYOUT, document)

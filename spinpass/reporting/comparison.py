"""Two reports beside each other, read from the JSON that ``spinpass report --save`` keeps and ``--json`` prints.

A.json, B.json  ->  which is better, and by how much, window by window where both scored the same text
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinpass.errors import ConfigError
from spinpass.evaluation import Change, paired
from spinpass.formats import read_object
from spinpass.values import Fields

from .families import families, joined
from .markup import details, table, tag
from .numbers import counted, short, small, times, with_error
from .page import document, put
from .panels import layer_panels
from .report import DOCUMENT, LAYOUT
from .scatter import Measured, megabytes, pareto
from .verdict import headline, told_apart

_ORIGINAL, _ROTATED, _FILE = "original", "rotated", "file"


@dataclass(frozen=True)
class Scored:
    """A program or a file of a report: its bytes, the losses of its windows, and its speed, nan where it has none."""

    bytes: int
    losses: tuple[float, ...]
    speed: float


@dataclass(frozen=True)
class SavedReport:
    """The numbers of a report that are compared.

    ``name``: of the file; ``about``: by name, how it came about; ``text``: a hash of what was scored; ``base``: the
    losses of the original program; ``scored``: by scheme or file and by what it is (original, rotated, file);
    ``errors``: by scheme, those of every weight of the rotated program.
    """

    name: str
    about: Mapping[str, str]
    text: str
    base: tuple[float, ...]
    scored: Mapping[tuple[str, str], Scored]
    errors: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, path: Path) -> SavedReport:
        """Read what ``spinpass report --save`` wrote.

        Raises:
            ConfigError: there is no such file, or it is no report, or one of another version.
            DamageError: it is no JSON.
        """
        if not path.is_file():
            raise ConfigError(f"there is no file {path}: name what spinpass report --save wrote")
        try:
            return cls._of(Fields.of(read_object(path), DOCUMENT, LAYOUT), path)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, found: Fields, path: Path) -> SavedReport:
        origin, config = found.inner("origin"), found.inner("plan").plain("config")
        about = {name: origin.text(name) for name in ("date", "command")} | {"model": found.text("model")}
        about |= {key: str(value) for key, value in config.items()}
        about |= {key: str(value) for key, value in origin.plain("versions").items()}
        unquantized = found.inner("unquantized")
        scored = {
            ("unquantized", _ROTATED): Scored(
                found.inner("bytes").count("after"), _losses(unquantized, "after"), math.nan
            )
        }
        errors: dict[str, dict[str, float]] = {}
        schemes, files = found.inner("schemes"), found.inner("files")
        for name in schemes.all:
            for side in (_ORIGINAL, _ROTATED):
                each = schemes.inner(name).inner(side)
                scored[name, side] = Scored(each.count("bytes"), _losses(each, "after"), math.nan)
            weights = schemes.inner(name).inner(_ROTATED).inner("errors")
            errors[name] = {fqn: weights.number(fqn) for fqn in weights.all}
        for name in files.all:
            each = files.inner(name)
            speed = each.number("decode_tokens_per_second")
            scored[name, _FILE] = Scored(each.count("bytes"), _losses(each, "after"), speed)
        base = _losses(unquantized, "before")
        for what, read in scored.items():
            if len(read.losses) != len(base):
                counts = f"has {counted(len(read.losses), 'window')}, the original {len(base)}"
                raise ConfigError(f"{found.place}: {', '.join(what)} {counts}: write the report anew")
        return cls(str(path), about, origin.text("text"), base, scored, errors)

    def ratio(self, what: tuple[str, str]) -> float:
        """The perplexity of a program or a file divided by that of the original program."""
        return math.exp(paired(self.base, self.scored[what].losses).mean)


@dataclass(frozen=True)
class ComparedReports:
    """Two reports, and whether both scored the same text."""

    first: SavedReport
    second: SavedReport

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: their files' names, with the folders where they are the same."""
        paths = Path(self.first.name), Path(self.second.name)
        return (paths[0].name, paths[1].name) if paths[0].name != paths[1].name else (str(paths[0]), str(paths[1]))

    @property
    def same_text(self) -> bool:
        """Whether losses can be compared window by window."""
        return self.first.text == self.second.text and len(self.first.base) == len(self.second.base)

    @property
    def common(self) -> list[tuple[str, str]]:
        """What both have, as (scheme or file, original, rotated or file)."""
        return [what for what in self.first.scored if what in self.second.scored]

    def change(self, what: tuple[str, str]) -> Change | None:
        """The change of the loss from the first to the second, paired by window; None where the texts differ."""
        if not self.same_text:
            return None
        return paired(self.first.scored[what].losses, self.second.scored[what].losses)

    def verdict(self) -> str:
        """Which is better, in one sentence."""
        rotated = {w[0]: w for w in self.common if w[1] == _ROTATED and w[0] != "unquantized"}
        if not rotated:
            return "The two reports have no scheme in common."
        chosen = headline({name: (self.second.ratio(w), self.second.scored[w].bytes) for name, w in rotated.items()})
        what, (a, b) = rotated[chosen], self.names
        ratios, change = (self.first.ratio(what), self.second.ratio(what)), self.change(what)
        sizes = " and ".join(dict.fromkeys(megabytes(each.scored[what].bytes) for each in (self.first, self.second)))
        both = f"{a} has {times(ratios[0])} × perplexity, {b} {times(ratios[1])}, at {sizes}"
        if change is None:
            return f"{chosen}: {both}; they scored different texts."
        if not told_apart(change):
            return f"{chosen}: {counted(len(self.first.base), 'window')} do not tell the two apart: {both}."
        better = int(change.mean < 0)
        against = (
            f"{times(ratios[better])} × perplexity against {times(ratios[1 - better])} of {self.names[1 - better]}"
        )
        return f"{chosen}: {self.names[better]} is better, with {against}, at {sizes}."

    def differing(self) -> list[tuple[str, str, str]]:
        """What differs in how the two came about, as (what, in the first, in the second)."""
        keys = dict.fromkeys([*self.first.about, *self.second.about])
        rows = [(key, self.first.about.get(key, "–"), self.second.about.get(key, "–")) for key in keys]
        return [row for row in rows if row[1] != row[2]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; a standard error is None for a single window, a speed where nothing was timed."""
        return {
            "reports": list(self.names),
            "verdict": self.verdict(),
            "same_text": self.same_text,
            "compared": [self._row(what) for what in self.common],
            "only": [
                [list(what) for what in one.scored if what not in other.scored]
                for one, other in ((self.first, self.second), (self.second, self.first))
            ],
            "differing": [dict(zip(("what", "first", "second"), row)) for row in self.differing()],
        }

    def _row(self, what: tuple[str, str]) -> dict[str, Any]:
        change = self.change(what)
        sides = {
            side: {"bytes": each.scored[what].bytes, "ratio": each.ratio(what), "tokens_per_second": _speed(each, what)}
            for side, each in (("first", self.first), ("second", self.second))
        }
        found: dict[str, Any] = {"name": what[0], "program": what[1], **sides}
        if change is not None:
            ratio = math.exp(change.mean)
            error = None if math.isnan(change.error) else ratio * change.error
            found |= {"second_over_first": ratio, "standard_error": error}
        return found


def compare_reports(first: SavedReport, second: SavedReport) -> ComparedReports:
    """Compare two reports. Raises ConfigError where both are one file."""
    if Path(first.name).resolve() == Path(second.name).resolve():
        raise ConfigError(f"{first.name} is named twice: name two reports")
    return ComparedReports(first, second)


def write_comparison(found: ComparedReports, path: Path) -> None:
    """Draw the page and put it at ``path``, whole or not at all. Raises ExportError where it cannot be written."""
    put(render_comparison(found), path)


def render_comparison(found: ComparedReports) -> str:
    """The page of a comparison as text."""
    a, b = found.names
    header = tag(
        "header",
        tag("h1", found.verdict()),
        tag("p", tag("strong", f"{a} and {b}"), f" · {found.first.about['model']}", class_="quiet"),
    )
    made = [
        ("schemes", "Size, quality, speed", list(_schemes(found))),
        ("layers", "Loss per layer", list(_layers(found))),
        ("differing", "What differs", list(_differing(found))),
    ]
    return document(f"{a} and {b}", header, [each for each in made if each[2]])


def _schemes(found: ComparedReports) -> Iterator[object]:
    points: list[Measured] = []
    for kind, each in (("before", found.first), ("after", found.second)):
        for (name, program), scored in each.scored.items():
            if program != _ORIGINAL and name != "unquantized":
                points.append(Measured(name, kind, scored.bytes, each.ratio((name, program)), scored.speed))
    yield pareto(points, dict(zip(("before", "after"), found.names)))
    head = (
        "scheme",
        "program",
        *(f"{name}, ÷ unquantized" for name in found.names),
        "second ÷ first",
        "MB of first",
        "MB of second",
    )
    yield table(head, [_cells(found, what) for what in found.common], numbers=5)
    if not found.same_text:
        why = "The two scored different texts, so that only their ratios to the unquantized program can be compared."
        yield tag("p", why, class_="quiet")


def _cells(found: ComparedReports, what: tuple[str, str]) -> list[object]:
    change = found.change(what)
    sides = (found.first, found.second)
    ratios = [f"{each.ratio(what):.4f}" for each in sides]
    against = "" if change is None else with_error(math.exp(change.mean), math.exp(change.mean) * change.error, 4)
    return [*what, *ratios, against, *(megabytes(each.scored[what].bytes)[:-3] for each in sides)]


def _layers(found: ComparedReports) -> Iterator[object]:
    for name, before in found.first.errors.items():
        after = found.second.errors.get(name, {})
        both = {fqn: (before[fqn], after[fqn]) for fqn in before if fqn in after}
        if both:
            yield tag("h3", f"{name}, rotated")
            kinds = families((joined([fqn]), pair) for fqn, pair in both.items())
            yield layer_panels("relative error", kinds, sides=found.names)
            rows = [[fqn, *map(small, pair), short(pair[1] / pair[0]) if pair[0] else ""] for fqn, pair in both.items()]
            head = ("weight", *found.names, "second ÷ first")
            yield details(f"All {counted(len(both), 'weight')}", table(head, rows, numbers=3))


def _differing(found: ComparedReports) -> Iterator[object]:
    rows = found.differing()
    if rows:
        yield table(("what", *found.names), rows, numbers=0)
    for name, one, other in zip(found.names, (found.first, found.second), (found.second, found.first)):
        alone = [what for what in one.scored if what not in other.scored]
        if alone:
            listed = ", ".join(dict.fromkeys(what[0] for what in alone))
            yield tag("p", f"Only in {name}: {listed}.")


def _losses(fields: Fields, name: str) -> tuple[float, ...]:
    inner = fields.inner(name)
    found = inner.all.get("losses")
    if not isinstance(found, list) or not found or not all(isinstance(x, int | float) for x in found):
        raise ConfigError(f"{inner.place}.losses is not a list of numbers: write the report anew")
    return tuple(map(float, found))


def _speed(report: SavedReport, what: tuple[str, str]) -> float | None:
    speed = report.scored[what].speed
    return None if math.isnan(speed) else speed

"""What the records add up to, held against what the project wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from .records import Record
from .states import SAME

Records = Mapping[str, Record]  # by type
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One line of the summary: a count out of how many (or a time), and what is wanted of it."""

    what: str
    measured: str
    wanted: str
    reached: bool


def targets(prefill: Records, decode: Records) -> list[Target]:
    """The summary. Switches of a configuration (``type@name``) are not counted as types."""
    types = [record for name, record in prefill.items() if "@" not in name]
    measured = [record for record in types if record.get("runs")]
    decoders = [record for name, record in decode.items() if "@" not in name]
    times = [t for record in measured if (t := default_run(record).get("seconds")) is not None]
    return [
        _at_least("same function", _count(measured, lambda r: r["status"] == SAME), len(types), 180),
        _at_least("R1 in place", _count(measured, lambda r: bool(default_run(r).get("streams"))), len(types), 165),
        _at_least('R1 purely offline (tied="untie")', _count(measured, is_purely_offline), len(types), 120),
        *(_share(role, where, measured, wanted) for role, where, wanted in _SHARES),
        _at_least("decoding: same function", _count(decoders, lambda r: r["status"] == SAME), len(decoders), 60),
        _at_most("transform, median", median(times) if times else None, 1.0),
        _at_most("transform, slowest", max(times, default=None), 20.0),
    ]


_SHARES = (
    ("R2", "at every attention whose value path has no barrier", 0.95),
    ("R4", "at every down projection", 0.95),
    ("R3", "at every attention", 0.90),
)


def default_run(record: Record) -> Run:
    """The run of the default configuration, empty where there is none."""
    run: Run = record.get("runs", {}).get("default", {})
    return run


def is_purely_offline(record: Record) -> bool:
    """With a table of its own for the head, the residual stream is rotated and R1 leaves nothing online."""
    run: Run = record["runs"].get("untie", {})
    streams = run.get("streams") or []
    return bool(streams) and run["status"] == SAME and all(s["form"] == "offline" and not s["parts"] for s in streams)


def covered(record: Record, role: str) -> tuple[int, int]:
    """At how many of the places of R2, R3 or R4 the default configuration rotates, and how many there are."""
    run = default_run(record)
    done = run.get("covered", {}).get(role, 0) if run.get("status") == SAME else 0
    return done, record.get("places", {}).get(role, 0)


def _count(found: Iterable[Record], holds: Callable[[Record], bool]) -> int:
    return sum(map(holds, found))


def _at_least(what: str, count: int, of: int, wanted: int) -> Target:
    return Target(what, f"{count} of {of}", f"≥ {wanted}", count >= wanted)


def _share(role: str, where: str, found: Iterable[Record], wanted: float) -> Target:
    """Of the types that have such places at all."""
    pairs = [(done, places) for done, places in (covered(record, role) for record in found) if places]
    complete = sum(done == places for done, places in pairs)
    share = complete / len(pairs) if pairs else 0.0
    what = f"types with {role} {where}"
    return Target(what, f"{complete} of {len(pairs)} ({share:.1%})", f"≥ {wanted:.0%}", share >= wanted)


def _at_most(what: str, seconds: float | None, wanted: float) -> Target:
    shown = "–" if seconds is None else f"{seconds:.2f} s"
    return Target(what, shown, f"≤ {wanted:g} s", seconds is not None and seconds <= wanted)

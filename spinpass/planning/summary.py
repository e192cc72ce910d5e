"""A plan in fewer lines: what differs only in its layer stands together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from spinpass.analysis import Refusal

from .planned import PlannedSpace


class Planned(Protocol):
    """What was decided, as a plan has it."""

    @property
    def spaces(self) -> Sequence[PlannedSpace]:
        """What is rotated."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What is left alone."""


def grouped_spaces(plan: Planned, *, every_space: bool = False) -> dict[str, list[PlannedSpace]]:
    """Group spaces that differ only in their layer under one name; with ``every_space`` each keeps its own name."""
    groups: dict[tuple[str, ...], list[PlannedSpace]] = {}
    for space in plan.spaces:
        name = space.name if every_space else layer_pattern(space.name)
        key = (name, str(space.size), str(space.rotation), space.form, online_parts([space]))
        groups.setdefault(key, []).append(space)
    named: dict[str, list[PlannedSpace]] = {}
    for (name, *_), members in groups.items():
        named[members[0].name if len(members) == 1 else name if name not in named else members[0].name] = members
    return named


def grouped_refusals(plan: Planned, *, every_space: bool = False) -> dict[tuple[str, str], int]:
    """Count how often each thing is left alone for each reason, as (what, why) -> how often.

    Refusals that differ only in their layer count together, unless ``every_space``.
    """
    reasons: dict[tuple[str, str], int] = {}
    for refusal in plan.refusals:
        key = (refusal.what, refusal.why)
        key = key if every_space else (layer_pattern(refusal.what), layer_pattern(refusal.why))
        reasons[key] = reasons.get(key, 0) + 1
    return reasons


def layer_pattern(name: str) -> str:
    """Return the name with ``*`` for every part of it that is a number."""
    return re.sub(r"(?<=[._])\d+(?=[._:]|$)", "*", name)


def online_parts(spaces: Sequence[PlannedSpace]) -> str:
    """Say how many rotations of these spaces stay in the graph, and why the first one does."""
    parts = [part for space in spaces for part in space.online]
    if not parts:
        return "nothing"
    one, several = ("Hadamard", "Hadamards")
    if not all(space.rotation.is_structured for space in spaces if space.online):
        one, several = ("change of basis", "changes of basis")
    return f"{len(parts)} {one if len(parts) == 1 else several}: {parts[0].why}"

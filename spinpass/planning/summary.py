"""A plan in fewer lines: what differs only in the layer stands together."""

from __future__ import annotations

import re

from .plan import PlannedSpace, RotationPlan


def grouped_spaces(plan: RotationPlan, *, every_space: bool = False) -> dict[str, list[PlannedSpace]]:
    """Spaces that differ only in the layer, under one name; each under its own with ``every_space``."""
    groups: dict[tuple[str, ...], list[PlannedSpace]] = {}
    for space in plan.spaces:
        name = space.name if every_space else layer_pattern(space.name)
        key = (name, str(space.size), str(space.rotation), space.form, online_parts([space]))
        groups.setdefault(key, []).append(space)
    named: dict[str, list[PlannedSpace]] = {}
    for (name, *_), members in groups.items():
        named[members[0].name if len(members) == 1 else name if name not in named else members[0].name] = members
    return named


def grouped_refusals(plan: RotationPlan, *, every_space: bool = False) -> dict[tuple[str, str], int]:
    """(what is left alone, why) -> how often; those that differ only in the layer count together."""
    reasons: dict[tuple[str, str], int] = {}
    for refusal in plan.refusals:
        key = (refusal.what, refusal.why)
        key = key if every_space else (layer_pattern(refusal.what), layer_pattern(refusal.why))
        reasons[key] = reasons.get(key, 0) + 1
    return reasons


def layer_pattern(name: str) -> str:
    """The name with ``*`` for every number that is a part of it."""
    return re.sub(r"(?<=[._])\d+(?=[._:]|$)", "*", name)


def online_parts(spaces: list[PlannedSpace]) -> str:
    """How many rotations stay in the graph, and why the first."""
    parts = [part for space in spaces for part in space.online]
    if not parts:
        return "nothing"
    return f"{len(parts)} Hadamard{'s' * (len(parts) != 1)}: {parts[0].why}"

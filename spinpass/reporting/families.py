"""Sites and weights that differ only in the layer stand together, as a panel of bars shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from spinpass.planning import layer_pattern

from .activations import Pair

T = TypeVar("T")


def label(pair: Pair) -> str:
    """What a pair is called: ``key of layers.0.attn.k_proj``, ``input of layers.0.attn.{q_proj,k_proj,v_proj}``."""
    use = pair.names[0].use
    return f"{pair.kind} of {joined(pair.weights)}" + (f", use {use + 1}" if use else "")


def joined(fqns: Sequence[str]) -> str:
    """Write several names as one, their differing parts in braces, without ``.weight``."""
    parts = [fqn.removesuffix(".weight").split(".") for fqn in fqns]
    if len({len(p) for p in parts}) > 1:
        return ", ".join(".".join(p) for p in parts)
    columns = (list(dict.fromkeys(column)) for column in zip(*parts))
    return ".".join(names[0] if len(names) == 1 else "{" + ",".join(names) + "}" for names in columns)


def families(values: Iterable[tuple[str, tuple[T, T]]]) -> dict[str, list[tuple[int, T, T]]]:
    """Group name -> (before, after) as pattern -> (layer, before, after).

    The layer is the first number in a name, or the place in its family where several have the same.
    """
    found: dict[str, list[tuple[str, tuple[T, T]]]] = {}
    for name, both in values:
        found.setdefault(layer_pattern(name), []).append((name, both))
    return {pattern: _numbered(members) for pattern, members in found.items()}


def _numbered(members: Sequence[tuple[str, tuple[T, T]]]) -> list[tuple[int, T, T]]:
    layers = [_layer(name) for name, _ in members]
    places = layers if len(set(layers)) == len(layers) else range(len(layers))
    return [(place, *both) for place, (_, both) in zip(places, members)]


def _layer(name: str) -> int:
    found = re.search(r"(?<=[._])\d+(?=[._:]|$)", name)
    return int(found.group()) if found else 0


def worst_of_each(pairs: Iterable[Pair], most: int) -> list[Pair]:
    """Take of every family the pair with the largest max/median before; return the ``most`` largest, largest first."""
    grouped: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.before.vectors and pair.after.vectors:
            grouped.setdefault(layer_pattern(label(pair)), []).append(pair)
    worst = [max(members, key=_severity) for members in grouped.values()]
    return sorted(worst, key=_severity, reverse=True)[:most]


def _severity(pair: Pair) -> float:
    return pair.before.ratio if pair.before.ratio == pair.before.ratio else 0.0  # nan: nothing but zeros

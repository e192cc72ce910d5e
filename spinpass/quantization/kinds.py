"""The kinds of moves: what each is, and how fast it is learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from spinpass.config import nearest_name
from spinpass.errors import ConfigError


@dataclass(frozen=True)
class Learnable:
    """One kind of moves.

    Attributes:
        name: as it is asked for.
        rate: of Adam. Three times as much fits the text that is learned from and loses on any other.
        meaning: what it moves, for people.
        of_bases: it is a change of basis, which is learned before anything is rounded.
    """

    name: str
    rate: float
    meaning: str
    of_bases: bool = False


SCALE = Learnable("scales", 1e-3, "the scale of every group of a weight: s·e^θ")
ZERO = Learnable("zeros", 4e-3, "the zero point of every group that has one: round(z + ζ)")
OFFSET = Learnable(
    "offsets", 4e-3, "what every weight of less than 8 bits is rounded to: round(q + δ), δ in steps of its grid"
)
LATENT = Learnable("latents", 2e-3, "the same, by a move of low rank in place of one for each weight: round(q + A·B)")
GAIN = Learnable("gains", 1e-3, "the scales of norms and other vectors of floats: g·(1 + γ)")
CLIP = Learnable("clips", 2e-3, "the share of a token's range that activations and caches cover: c·e^κ")
TRANSFORM = Learnable(
    "transforms", 2e-3, "the factors of changes of basis, before anything is rounded: F·(I + E)", of_bases=True
)
STACK = Learnable("stacks", 2e-3, "a matrix for each head of values, or of queries and keys: S·(I + E)", of_bases=True)
GATE = Learnable("gates", 1e-2, "a scale for each channel of u in act(g)·u: e^δ", of_bases=True)

LEARNABLE: Mapping[str, Learnable] = {
    kind.name: kind for kind in (SCALE, ZERO, OFFSET, LATENT, GAIN, CLIP, TRANSFORM, STACK, GATE)
}
"""All kinds by name."""


def kinds_of_bases(names: Collection[str]) -> tuple[str, ...]:
    """Return those of some kinds that are learned before anything is rounded."""
    return tuple(name for name in names if LEARNABLE[name].of_bases)


def check_kinds(names: Collection[str]) -> None:
    """Raise ConfigError for a name that is none of a kind."""
    for name in names:
        if name not in LEARNABLE:
            near, all_ = nearest_name(name, LEARNABLE), ", ".join(LEARNABLE)
            raise ConfigError(f"{name!r} is nothing that can be learned{near}; there are {all_}")

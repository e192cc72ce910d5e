"""What is learned, in which phases, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from spinpass.errors import ConfigError

Phase = Literal["local", "full"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_SEEDS = 2**62  # on either side of 0: torch takes seeds of 64 bits, and each round of a run has one of its own


@dataclass(frozen=True)
class Learning:
    """How moves are learned.

    Args:
        kinds: what is learned, for example ``("scales", "offsets")``; which there are is for those to say who make the
            parts.
        phases: ``local`` fits one block of the program after the other to what that block returns in the original, in
            the memory of one block; ``full`` fits all together to what the original predicts.
        rounds: how many times a phase goes through the windows, in an order drawn anew each time.
        batch: windows to a step. Several ranks divide them, so there is no more than one rank for each.
        minutes: the wall-clock time that each phase may take, above 0; None for as long as ``rounds`` takes. It is
            turned into a number of steps by the time of the first ones.
        rate: times the rate of each kind.
        seed: of the order of windows.

    Raises:
        ConfigError: a value out of range, or a kind or phase given twice.
    """

    kinds: tuple[str, ...] = ("scales",)
    phases: tuple[Phase, ...] = ("full",)
    rounds: int = 1
    batch: int = 1
    minutes: float | None = None
    rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for what, named in (("kinds", self.kinds), ("phases", self.phases)):
            if not isinstance(named, (tuple, list)) or not all(isinstance(name, str) for name in named):
                raise ConfigError(f"{what}={named!r} is no sequence of names")
            object.__setattr__(self, what, tuple(named))
        for what in ("rounds", "batch", "seed"):
            number = getattr(self, what)
            if not isinstance(number, int) or isinstance(number, bool):
                raise ConfigError(f"{what}={number!r} is not an integer")
        for what, real in (("rate", self.rate), ("minutes", 1.0 if self.minutes is None else self.minutes)):
            if not isinstance(real, (int, float)) or isinstance(real, bool):
                raise ConfigError(f"{what}={real!r} is not a number")
        if not -_SEEDS <= self.seed < _SEEDS:
            raise ConfigError(f"seed={self.seed} is too large: choose one of at most 62 bits")
        for what, given in (("kinds", self.kinds), ("phases", self.phases)):
            if not given or len(set(given)) != len(given):
                raise ConfigError(f"{what}={given!r}: name at least one, and each once")
        unknown = [phase for phase in self.phases if phase not in PHASES]
        if unknown:
            raise ConfigError(f"phase {unknown[0]!r} is not one of {', '.join(PHASES)}")
        if self.rounds < 1:
            raise ConfigError(f"{self.rounds} rounds of learning: choose 1 or more")
        if self.batch < 1:
            raise ConfigError(f"{self.batch} windows to a step: choose 1 or more")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"{self.minutes} minutes of learning: choose more than 0, or leave them out")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate={self.rate} is not above 0")

    def steps(self, windows: int) -> int:
        """Return how many steps all rounds through so many windows are."""
        return max(1, self.rounds * windows // self.batch)

"""How learning went: what it was worth on windows that it was not taught on, and the curve to there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spinpass.errors import ConfigError


@dataclass(frozen=True)
class LearningRecord:
    """What moving parameters has done to the divergence from the original program, in nats per token, on held-out
    windows. It is kept where it helps.

    Attributes:
        before: the divergence of the program as it was.
        after: that of what was learned, without the kinds that were dropped.
        inputs: how many windows were held out.
        kinds: what was learned and is kept; empty where nothing is.
        dropped: what was learned and does not help there.
        steps: how many were taken, of all phases.
        losses: by step, the mean loss of the training windows since the entry before.
        checks: by step, the divergence on the held-out windows.
    """

    before: float
    after: float
    inputs: int
    kinds: tuple[str, ...] = ("scales",)
    dropped: tuple[str, ...] = ()
    steps: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    checks: tuple[tuple[int, float], ...] = ()

    @property
    def kept(self) -> bool:
        """Say whether anything that was learned is in the result."""
        return bool(self.kinds) and self.after < self.before

    @property
    def summary(self) -> str:
        """Say in one sentence what became of it."""
        on = f"on {self.inputs} held-out input{'s' if self.inputs > 1 else ''}"
        what = " and ".join(self.kinds if self.kept else (*self.kinds, *self.dropped))
        moved = f"the divergence went from {self.before:.4f} to {self.after:.4f} nats per token {on}"
        if not self.kept:
            return f"learned {what} and dropped them: {moved}"
        left = f"; dropped {' and '.join(self.dropped)}, which did not help there" if self.dropped else ""
        return f"learned {what}: {moved}{left}"

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LearningRecord:
        """Return the value that :meth:`to_dict` has written. Raises ConfigError where it is none."""
        try:
            given = {name: value for name, value in data.items() if name != "kept"}
            for name in ("kinds", "dropped"):
                given[name] = tuple(given[name])
            for name in ("losses", "checks"):
                given[name] = tuple(map(tuple, given[name]))
            return LearningRecord(**given)
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"this is no record of learning ({error}): take it as it was written") from error

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self) | {"kept": self.kept}

"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinpass.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: what logits are divided by before a token is drawn. 0 takes the likeliest.
        top_k: how many of the likeliest tokens it is drawn from. 0 draws from all.
        top_p: the share of the probability, of the likeliest tokens first, that it is drawn from, above 0 and at most
            1.
        seed: of the draws.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature} is negative: choose 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is not in (0, 1]: choose a share of the probability")
        given = [name for name, neutral in (("top_k", 0), ("top_p", 1), ("seed", 0)) if getattr(self, name) != neutral]
        if self.temperature == 0 and given:
            raise ConfigError(
                f"{given[0]} {getattr(self, given[0])} is of draws, and temperature 0 draws nothing: give a "
                f"temperature, or leave {given[0]} out"
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token for float logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled, tokens = (logits.double() / self.temperature).sort(descending=True)
        probabilities = scaled.softmax(-1)
        if self.top_k:
            probabilities[self.top_k :] = 0
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= self.top_p * probabilities.sum()] = 0
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])

"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spinpass.errors import ConfigError

from .penalties import Penalties, Said


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as transformers does it: the same scores, and the same draws from one seed.

    Args:
        temperature: what logits are divided by before a token is drawn. 0 takes the likeliest.
        top_k: how many of the likeliest tokens it is drawn from. 0 draws from all.
        top_p: the share of the probability, of the likeliest tokens first, that it is drawn from, above 0 and at most
            1.
        seed: of the draws.
        min_p: the share of the likeliest token's probability that a token needs to be drawn, from 0 to 1.
        penalties: how logits depend on what has been said, drawn or not.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    penalties: Penalties = field(default_factory=Penalties)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature} is negative: choose 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is not in (0, 1]: choose a share of the probability")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(
                f"min_p {self.min_p} is not in [0, 1]: choose a share of the likeliest token's probability"
            )
        neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}
        given = [name for name, value in neutral.items() if getattr(self, name) != value]
        if self.temperature == 0 and given:
            raise ConfigError(
                f"{given[0]} {getattr(self, given[0])} is of draws, and temperature 0 draws nothing: give a "
                f"temperature, or leave {given[0]} out"
            )

    def choose(self, logits: Tensor, said: Said, generator: torch.Generator) -> Tensor:
        """A token for each row, int64 (batch,), of float32 logits (batch, vocabulary).

        Raises ConfigError: the penalties leave no token to choose.
        """
        scores = self.penalties(logits, said)
        if scores is not logits and bool((scores == -torch.inf).all(1).any()):
            raise ConfigError("no token is left to choose: allow more of them (no_repeat_ngram_size, bad_words_ids)")
        if self.temperature == 0:
            return scores.argmax(1)
        return torch.multinomial(self._kept(scores).softmax(1), 1, generator=generator)[:, 0]

    def _kept(self, scores: Tensor) -> Tensor:
        """Scores at the temperature, -inf for tokens that are not drawn. Each step sees what the one before left."""
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[1]))[0][:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ascending, tokens = scores.sort()
            beyond = ascending.softmax(1).cumsum(1) <= 1 - self.top_p
            beyond[:, -1] = False
            scores = scores.masked_fill(beyond.scatter(1, tokens, beyond), -torch.inf)
        if self.min_p:
            shares = scores.softmax(1)
            scores = scores.masked_fill(shares < self.min_p * shares.amax(1, keepdim=True), -torch.inf)
        return scores

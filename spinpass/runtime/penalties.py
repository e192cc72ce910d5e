"""What keeps a model from saying the same again, a bad word, or too little: scores changed by what has been said.

    score -> score / p where it is positive, score · p where it is not      of every token that has been said
    score -> -inf      of a token that would make an n-gram, or a bad word, whole; of end tokens before there are enough

These are the logits processors of transformers, value for value and in its order. A row of a padded batch is treated as
it would be alone: padding has not been said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spinpass.errors import ConfigError

Processor = Callable[[Tensor, Tensor], Tensor]
"""As transformers has it: token ids, int64 (batch, length), and scores, float32 (batch, vocabulary), to scores."""


@dataclass(frozen=True)
class Said:
    """What the next token follows.

    Args:
        ids: int64 (batch, length), the prompt and what was chosen.
        real: bool (batch, length), False for padding.
        chosen: how many of the last tokens were chosen.
        ends: the tokens that end a sequence.
    """

    ids: Tensor
    real: Tensor
    chosen: int = 0
    ends: Collection[int] = ()


@dataclass(frozen=True)
class Penalties:
    """How scores depend on what has been said. By default they do not.

    Args:
        repetition: what scores of tokens are divided by that have been said (multiplied, where they are negative).
        no_repeat_ngram: no run of so many tokens comes twice. 0 allows all.
        bad_words: runs of tokens that are never made whole. An end token by itself is none.
        min_new_tokens: how many tokens are chosen before one that ends a sequence.
        processors: applied after these.

    Raises:
        ConfigError: a value out of range.
    """

    repetition: float = 1.0
    no_repeat_ngram: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    processors: tuple[Processor, ...] = ()

    def __post_init__(self) -> None:
        if not self.repetition > 0:
            raise ConfigError(f"repetition_penalty {self.repetition} is not above 0; 1 changes nothing")
        if self.no_repeat_ngram < 0:
            raise ConfigError(f"no_repeat_ngram_size {self.no_repeat_ngram} is negative; 0 allows all")
        if self.min_new_tokens < 0:
            raise ConfigError(f"min_new_tokens {self.min_new_tokens} is negative; 0 allows an end at once")
        wrong = [word for word in self.bad_words if not word or min(word) < 0]
        if wrong:
            raise ConfigError(f"bad_words_ids holds {list(wrong[0])}, which is no word: give lists of token ids")

    def __call__(self, scores: Tensor, said: Said) -> Tensor:
        """Scores, float32 (batch, vocabulary), as they are to be chosen by.

        Raises ConfigError: a bad word has a token that the model does not know.
        """
        if self.repetition != 1:
            scores = _repeated(scores, said, self.repetition)
        if self.no_repeat_ngram:
            scores = _no_ngram_twice(scores, said, self.no_repeat_ngram)
        if self.bad_words:
            scores = _no_bad_word(scores, said, self.bad_words)
        if said.chosen < self.min_new_tokens and said.ends:
            tokens = torch.arange(scores.shape[1], device="cpu")
            scores = scores.masked_fill(torch.isin(tokens, torch.tensor(sorted(said.ends), device="cpu")), -torch.inf)
        for process in self.processors:
            scores = process(said.ids, scores)
        return scores


def _repeated(scores: Tensor, said: Said, penalty: float) -> Tensor:
    vocabulary = scores.shape[1]
    # what is no token of the scores, padding too, goes to a column behind the last
    ids = said.ids.masked_fill(~said.real, vocabulary).clamp(max=vocabulary)
    wide = functional.pad(scores, (0, 1))
    found = wide.gather(1, ids)
    return wide.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))[:, :vocabulary]


def _no_ngram_twice(scores: Tensor, said: Said, size: int) -> Tensor:
    length, vocabulary = said.ids.shape[1], scores.shape[1]
    if length < size:
        return scores
    begun = length + 1 - size  # where the n-gram begins that the next token makes whole
    runs, prefix = said.ids.unfold(1, size, 1), said.ids[:, begun:]
    again = (runs[..., :-1] == prefix[:, None]).all(-1)
    again &= said.real.unfold(1, size, 1).all(-1) & said.real[:, begun:].all(-1, keepdim=True)
    last = torch.where(again, runs[..., -1].clamp(max=vocabulary), vocabulary)
    banned = scores.new_zeros((len(scores), vocabulary + 1), dtype=torch.bool).scatter(1, last, True)
    return scores.masked_fill(banned[:, :vocabulary], -torch.inf)


def _no_bad_word(scores: Tensor, said: Said, words: Collection[tuple[int, ...]]) -> Tensor:
    banned = torch.zeros_like(scores, dtype=torch.bool)
    for word in words:
        *prefix, last = word
        if max(word) >= scores.shape[1]:
            raise ConfigError(f"bad_words_ids holds the token {max(word)}, and the model knows {scores.shape[1]}")
        if len(prefix) > said.ids.shape[1] or (not prefix and last in said.ends):
            continue
        begun = said.ids.shape[1] - len(prefix)
        there = (said.ids[:, begun:] == torch.tensor(prefix, dtype=torch.int64, device="cpu")).all(1) & said.real[
            :, begun:
        ].all(1)
        banned[:, last] |= there
    return scores.masked_fill(banned, -torch.inf)

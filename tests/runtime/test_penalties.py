"""Scores and draws beside the logits processors of transformers, value for value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from spinpass.errors import ConfigError
from spinpass.runtime import Penalties, Sampling
from spinpass.runtime.penalties import Said

VOCABULARY, ENDS = 23, (2, 7)
WORDS = ((4,), (5, 6), (1, 2, 3), (2,))


def said(length: int, seed: int = 0, padding: tuple[int, ...] = (0, 0, 0)) -> Said:
    """Few tokens, so that they come again; the first of each row are padding."""
    ids = torch.randint(VOCABULARY // 3, (3, length), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(length)[None] >= torch.tensor(padding)[:, None]
    return Said(ids, real, chosen=2, ends=ENDS)


def logits(seed: int = 1) -> Tensor:
    return torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("mine", "process"),
    [
        (Penalties(repetition=1.3), lambda n: theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        (Penalties(repetition=0.5), lambda n: theirs.RepetitionPenaltyLogitsProcessor(0.5)),
        (Penalties(no_repeat_ngram=1), lambda n: theirs.NoRepeatNGramLogitsProcessor(1)),
        (Penalties(no_repeat_ngram=2), lambda n: theirs.NoRepeatNGramLogitsProcessor(2)),
        (Penalties(no_repeat_ngram=3), lambda n: theirs.NoRepeatNGramLogitsProcessor(3)),
        (Penalties(bad_words=WORDS), lambda n: theirs.NoBadWordsLogitsProcessor([*map(list, WORDS)], [*ENDS])),
        (Penalties(min_new_tokens=3), lambda n: theirs.MinNewTokensLengthLogitsProcessor(n - 2, 3, [*ENDS])),
        (Penalties(min_new_tokens=2), lambda n: theirs.MinNewTokensLengthLogitsProcessor(n - 2, 2, [*ENDS])),
    ],
)
def test_penalties_are_theirs(mine: Penalties, process: Callable[[int], Any], length: int) -> None:
    if length < 2 and mine.min_new_tokens:
        return
    for seed in range(3):
        history, scores = said(length, seed), logits(seed)
        before = scores.clone()
        assert torch.equal(mine(scores, history), process(length)(history.ids, scores.clone()))
        assert torch.equal(scores, before), "what is given is left as it is"


def test_each_changes_something() -> None:
    """Of the cases above: a comparison of what nothing happens to would prove nothing."""
    for mine in (
        Penalties(1.3),
        Penalties(no_repeat_ngram=3),
        Penalties(bad_words=((1, 2, 3),)),
        Penalties(min_new_tokens=3),
    ):
        history = Said(torch.tensor([[1, 2, 3, 9, 1, 2]] * 3), torch.ones(3, 6).bool(), 2, ENDS)
        assert not torch.equal(mine(logits(), history), logits()), mine


def test_padding_has_not_been_said() -> None:
    """A row is what it is alone, whatever stands in front."""
    mine = Penalties(1.7, 2, ((0, 5), (0, 0, 6), (3,)), processors=())
    whole, scores = said(12, padding=(0, 5, 9)), logits()
    found = mine(scores, whole)
    for row, padding in enumerate((0, 5, 9)):
        alone = Said(whole.ids[row : row + 1, padding:], whole.real[row : row + 1, padding:], 2, ENDS)
        assert torch.equal(found[row : row + 1], mine(scores[row : row + 1], alone))
    assert not torch.equal(found, mine(scores, Said(whole.ids, torch.ones_like(whole.real), 2, ENDS)))


def test_processors_of_others_come_last() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def mine(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((ids, scores))
        return scores + 1

    history = said(6)
    found = Penalties(2.0, processors=(mine,))(logits(), history)
    assert torch.equal(seen[0][0], history.ids) and torch.equal(seen[0][1], Penalties(2.0)(logits(), history))
    assert torch.equal(found, seen[0][1] + 1)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("top_k", [0, 4, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.9])
def test_what_is_drawn_from_is_theirs(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    warpers = [theirs.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    expected, history = logits(), said(4)
    for warp in warpers:
        expected = warp(history.ids, expected)
    mine = Sampling(temperature, top_k, top_p, min_p=min_p)
    assert torch.equal(mine._kept(logits()), expected)
    torch.manual_seed(5)
    drawn = torch.multinomial(expected.softmax(-1), 1)[:, 0]
    assert torch.equal(mine.choose(logits(), history, torch.Generator().manual_seed(5)), drawn)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"repetition": 0.0}, "repetition_penalty 0.0 is not above 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram_size -1 is negative"),
        ({"min_new_tokens": -1}, "min_new_tokens -1 is negative"),
        ({"bad_words": ((),)}, r"bad_words_ids holds \[\], which is no word"),
        ({"bad_words": ((3, -1),)}, r"bad_words_ids holds \[3, -1\], which is no word"),
    ],
)
def test_penalties_out_of_range(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Penalties(**options)


def test_a_word_that_the_model_does_not_know_and_no_token_left() -> None:
    with pytest.raises(ConfigError, match="bad_words_ids holds the token 99, and the model knows 23"):
        Penalties(bad_words=((1, 99),))(logits(), said(4))
    every = Sampling(penalties=Penalties(bad_words=tuple((token,) for token in range(VOCABULARY) if token not in ENDS)))
    generator = torch.Generator()
    assert set(every.choose(logits(), said(4), generator).tolist()) <= set(ENDS)
    with pytest.raises(ConfigError, match="no token is left to choose"):
        Sampling(penalties=Penalties(no_repeat_ngram=1)).choose(
            logits(), Said(torch.arange(VOCABULARY).expand(3, -1), torch.ones(3, VOCABULARY).bool()), generator
        )

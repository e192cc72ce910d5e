"""A conversation with a folder: several turns, in the tokenizer's chat template, on one KV cache.

What has been read stays in the cache, as far as the tokens of the next turn begin with it: a template may write earlier
turns in another way by then, and text that a model wrote may be cut into tokens otherwise when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from spinpass.errors import ConfigError, ExportError, first_line

from . import decoding
from .decoder import OrtDecoder
from .sampling import Sampling
from .text_pieces import Pieces


class Conversation:
    """Turns of a user and a model.

    Args:
        decoder: the folder, whose tokenizer has a chat template.
        system: what the model is told before the first turn; empty tells it nothing.
        sampling: how each token is chosen. None takes the likeliest.
        max_new_tokens: of each answer, at most.

    Attributes:
        turns: what has been said, as chat templates take it.
        read: how many tokens of the last turn were in the cache already.

    Raises:
        ConfigError: the tokenizer has no chat template, or the limit is below 1.
    """

    def __init__(
        self, decoder: OrtDecoder, *, system: str = "", sampling: Sampling | None = None, max_new_tokens: int = 512
    ) -> None:
        check_template(decoder.tokenizer, str(decoder.folder))
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} is less than 1")
        self._decoder, self._sampling, self._limit = decoder, sampling or Sampling(), max_new_tokens
        self._system = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        """Forget what has been said."""
        self.turns: list[dict[str, str]] = list(self._system)
        self.read = 0
        self._cached: list[int] = []
        self._state: Any = None

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Return the answer to ``text``, piece by piece, up to an end token, the limit, or when ``stopped`` says so.

        What has been written until then is the model's turn.

        Raises:
            ConfigError: the conversation is longer than the model has positions for; nothing is added to it.
            ExportError: the chat template cannot be used.
        """
        tokenizer = self._decoder.tokenizer
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = chat_tokens(tokenizer, turns, str(self._decoder.folder))
        self._decoder.check_length(len(ids), self._limit)
        self._go_back(ids)
        self.read = len(self._cached)
        self.turns = turns
        pieces, said = Pieces(tokenizer), list[str]()
        try:
            for token in self._tokens(ids[len(self._cached) :]):
                if token in self._decoder.end_tokens or stopped():
                    break
                for piece in pieces.add(token):
                    said.append(piece)
                    yield piece
            for piece in pieces.rest():
                said.append(piece)
                yield piece
        finally:
            self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]

    def _go_back(self, ids: list[int]) -> None:
        """Keep of the cache what the tokens begin with, but for the last of them, which is read in any case."""
        graph: Any = self._decoder.graph
        pairs = zip(self._cached, ids[:-1], strict=False)
        common = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(self._cached), len(ids) - 1))
        kept = self._state is not None and (common == len(self._cached) or graph.rewind(self._state, common))
        if kept:
            self._cached = self._cached[:common]
        else:
            self._state, self._cached = graph.start(1), []

    def _tokens(self, new: list[int]) -> Iterator[int]:
        """Read these tokens on top of the cache and go on, keeping count of what the cache holds."""
        prompt = torch.tensor([new], dtype=torch.int64)
        self._cached += new
        found = decoding.new_tokens(
            self._decoder.graph, prompt, self._limit, self._sampling, self._decoder.end_tokens, state=self._state
        )
        chosen: int | None = None
        for token in found:
            if chosen is not None:
                self._cached.append(chosen)  # it was read to choose this one
            chosen = int(token)
            yield chosen


def check_template(tokenizer: Any, where: str) -> None:
    """Raise ConfigError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {where} has no chat template: use spinpass generate")


def chat_tokens(tokenizer: Any, turns: list[dict[str, str]], where: str) -> list[int]:
    """Return the tokens of turns in the chat template, up to where the model's answer begins.

    Raises ExportError: the template cannot be used.
    """
    try:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # the template is run in Jinja's sandbox, and raises whatever it raises there
        raise ExportError(f"the chat template of {where} cannot be used: {first_line(error)}") from error

"""A conversation with a folder: several turns, in the tokenizer's chat template, on one KV cache.

What has been read stays in the cache, as far as the tokens of the next turn begin with it: a template may write earlier
turns in another way by then, and text that a model wrote may be cut into tokens otherwise when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from spinpass.errors import ConfigError, ExportError, first_line

from . import decoding
from .decoder import Decoder
from .sampling import Sampling
from .text_pieces import Pieces, StopText


class Conversation:
    """Turns of a user and a model.

    Args:
        decoder: the folder, whose tokenizer has a chat template, in ONNX Runtime, OpenVINO or ExecuTorch.
        system: what the model is told before the first turn; empty tells it nothing.
        sampling: how each token is chosen. None takes the likeliest.
        max_new_tokens: of each answer, at most.
        stop: texts that end an answer, and are no part of it.

    Attributes:
        turns: what has been said, as chat templates take it.
        read: how many tokens of the last turn were in the cache already.

    Raises:
        ConfigError: the tokenizer has no chat template, or the limit is below 1.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        system: str = "",
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        stop: Collection[str] = (),
    ) -> None:
        check_template(decoder.tokenizer, str(decoder.folder))
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} is less than 1")
        self._decoder, self._sampling, self._limit = decoder, sampling or Sampling(), max_new_tokens
        self._stop = tuple(stop)
        self._system = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        """Forget what has been said."""
        self.turns: list[dict[str, str]] = list(self._system)
        self.read = 0
        self._reading: decoding.Reading | None = None

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
        reading = self._go_back(ids)
        self.read = reading.ids.shape[1]
        self.turns = turns
        pieces, said = StopText(Pieces(tokenizer), self._stop), list[str]()
        prompt, ends = torch.tensor([ids[self.read :]], dtype=torch.int64, device="cpu"), self._decoder.end_tokens
        try:
            for token in decoding.new_tokens(
                self._decoder.graph, prompt, self._limit, self._sampling, ends, reading=reading
            ):
                if int(token) in ends or stopped():
                    break
                for piece in pieces.add(int(token)):
                    said.append(piece)
                    yield piece
                if pieces.ended:
                    break
            for piece in pieces.rest():
                said.append(piece)
                yield piece
        finally:
            self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]

    def _go_back(self, ids: list[int]) -> decoding.Reading:
        """Keep of the cache what the tokens begin with, but for the last of them, which is read in any case."""
        graph: Any = self._decoder.graph
        reading = self._reading
        if reading is None or not reading.go_back(graph, torch.tensor([ids], device="cpu")):
            reading = self._reading = decoding.Reading.begun(graph, 1)
        return reading


def check_template(tokenizer: Any, where: str) -> None:
    """Raise ConfigError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {where} has no chat template: use spinpass generate")


def check_characters(text: str) -> None:
    """Raise ConfigError where bytes that are no UTF-8 were read as text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the text holds bytes that are no UTF-8: type it again, or write it as UTF-8") from error


def chat_tokens(tokenizer: Any, turns: list[dict[str, str]], where: str) -> list[int]:
    """Return the tokens of turns in the chat template, up to where the model's answer begins.

    Raises ConfigError: a turn is no text. Raises ExportError: the template cannot be used.
    """
    for turn in turns:
        check_characters(turn["content"])
    try:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # the template is run in Jinja's sandbox, and raises whatever it raises there
        raise ExportError(f"the chat template of {where} cannot be used: {first_line(error)}") from error

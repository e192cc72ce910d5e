"""The text that tokens become which come one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer writes for a character that lacks bytes


class Pieces:
    """What every token adds to the text that was there, once its characters are whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, token: int) -> Iterator[str]:
        """The text that ``token`` completes, if any."""
        self._tokens.append(token)
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        if not text.endswith(_UNFINISHED):
            yield from self._new(text)

    def rest(self) -> Iterator[str]:
        """What is left at the end."""
        yield from self._new(str(self._tokenizer.decode(self._tokens, skip_special_tokens=True)))

    def _new(self, text: str) -> Iterator[str]:
        if len(text) > len(self._shown):
            yield text[len(self._shown) :]
            self._shown = text

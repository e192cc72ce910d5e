"""The text that tokens become which come one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from spinpass.errors import ConfigError

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


class StopText:
    """Pieces of text up to one of several texts, which is not shown, and neither is what might become one.

    Args:
        pieces: where they come from.
        stop: the texts.

    Attributes:
        ended: one of them has come.

    Raises:
        ConfigError: one of them is empty.
    """

    def __init__(self, pieces: Pieces, stop: Collection[str]) -> None:
        if not all(stop):
            raise ConfigError("a text to stop at is empty: every text begins with that; give at least a letter")
        self._pieces, self._stop, self._held = pieces, tuple(stop), ""
        self.ended = False

    def add(self, token: int) -> Iterator[str]:
        """The text that ``token`` makes sure of, if any; none once one has ended it."""
        for piece in self._pieces.add(token):
            yield from self._more(piece)

    def rest(self) -> Iterator[str]:
        """What is left at the end."""
        for piece in self._pieces.rest():
            yield from self._more(piece)
        if self._held and not self.ended:
            yield self._held
            self._held = ""

    def _more(self, piece: str) -> Iterator[str]:
        if self.ended:
            return
        text = self._held + piece
        found = min((at for each in self._stop if (at := text.find(each)) >= 0), default=None)
        self.ended = found is not None
        sure = self._sure(text) if found is None else found
        self._held = text[sure:]
        if sure:
            yield text[:sure]

    def _sure(self, text: str) -> int:
        """How much of the text is no beginning of one that it might stop at."""
        longest = max(map(len, self._stop), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        return next((i for i in starts if any(each.startswith(text[i:]) for each in self._stop)), len(text))

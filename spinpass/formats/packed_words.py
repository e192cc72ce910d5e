"""Codes as words of a checkpoint, packed when they are read:  q  ->  int32 words along one of its axes.

A checkpoint of integers is written like one of floats, a tensor after the other (:mod:`.shards`): what stands in memory
of a weight is a piece of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spinpass.graph import Rows
from spinpass.operators import pack_words, words

_PERIOD = 32  # codes of any width that fill whole words
_PIECE = 1 << 22  # codes that are packed at once


@dataclass(frozen=True, eq=False)
class PackedWords:
    """Codes 0 … 2^bits − 1 in words of 32 bits along axis ``dim`` (:class:`spinpass.graph.ConstantSource`).

    Args:
        codes: uint8 (rows, columns), in the orientation of the result.
        bits: of each.
        dim: 0 packs along the rows, 1 along the columns.
    """

    codes: Tensor
    bits: int
    dim: int

    @property
    def shape(self) -> torch.Size:
        """That of the words."""
        return torch.Size(words(n, self.bits) if axis == self.dim else n for axis, n in enumerate(self.codes.shape))

    @property
    def dtype(self) -> torch.dtype:
        """Int32."""
        return torch.int32

    @property
    def device(self) -> torch.device:
        """That of the codes."""
        return self.codes.device

    @property
    def by_rows(self) -> bool:
        """They do."""
        return True

    def read(self, rows: Rows) -> Tensor:
        """Return these rows of the words; see :class:`spinpass.graph.ConstantSource`."""
        if isinstance(rows, Tensor):
            return self._between(0, self.shape[0])[rows]
        first, last, step = rows.indices(self.shape[0])
        return self._between(first, last)[::step]

    def exact(self, rows: Rows) -> Tensor:
        """Return the same: integers are exact."""
        return self.read(rows)

    def _between(self, first: int, last: int) -> Tensor:
        if self.dim == 1:
            count = max(1, _PIECE // max(self.codes.shape[1], 1))
            pieces = (slice(at, min(at + count, last)) for at in range(first, last, count))
            packed = [pack_words(self.codes[piece], self.bits, 1) for piece in pieces]
        else:
            start = first // self.bits  # in periods, each of which has as many words as a code has bits
            periods = max(1, _PIECE // (_PERIOD * max(self.codes.shape[1], 1)))
            begins = range(start, -(-last // self.bits), periods)
            parts = (self.codes[at * _PERIOD : (at + periods) * _PERIOD] for at in begins)
            packed = [pack_words(part, self.bits, 0) for part in parts]
            offset = start * self.bits
            packed = [torch.cat(packed)[first - offset : last - offset]] if packed else []
        return torch.cat(packed) if packed else torch.zeros(0, *self.shape[1:], dtype=torch.int32, device="cpu")

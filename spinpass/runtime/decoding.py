"""The loop of generation: prompt, token, token, ... for a batch of sequences of one length.

All decoders of the package run it, each over a :class:`Graph` of its own runtime. What is asked of them is told in
:mod:`.ort_model` (``generate`` as transformers has it) and :mod:`.decoder` (one sequence, with times and logits).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .penalties import Said
from .sampling import Sampling

PROMPT_CHUNK = 512
"""How many tokens of one sequence's prompt are read per call, which bounds the memory of the logits."""


class Graph(Protocol):
    """A model with a KV cache in some runtime."""

    def start(self, batch: int, /) -> Any:
        """The state before the first token of so many sequences, with an empty cache."""

    def step(self, ids: Tensor, state: Any, mask: Tensor | None = None, /) -> Tensor:
        """Read new tokens, int64 (batch, length), and advance ``state``. Returns logits (batch, length, vocabulary).

        ``mask``: (batch, length), 0 for padding. None has no padding.
        """


@dataclass
class Reading:
    """What a graph has read of a batch, which goes on where it stopped.

    Args:
        state: what :meth:`Graph.start` or a step left.
        ids: int64 (batch, read).
        real: bool (batch, read), False for padding.
    """

    state: Any
    ids: Tensor
    real: Tensor

    @staticmethod
    def begun(graph: Graph, batch: int) -> Reading:
        """Nothing of so many sequences."""
        return Reading(
            graph.start(batch),
            torch.zeros(batch, 0, dtype=torch.int64, device="cpu"),
            torch.ones(batch, 0, device="cpu").bool(),
        )

    def read(self, graph: Graph, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read these as well. Returns the logits behind the last, float32 (batch, vocabulary)."""
        logits = graph.step(ids, self.state, mask)[:, -1].float()
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        self.ids, self.real = torch.cat([self.ids, ids], 1), torch.cat([self.real, real], 1)
        return logits

    def go_back(self, graph: Any, ids: Tensor, mask: Tensor | None = None) -> bool:
        """Forget all but what ``ids``, (batch, length), begin with, and their last token, which is to be read again.

        Args:
            graph: one that can :meth:`rewind <.DecoderGraph.rewind>`.
            ids: int64 (batch, length).
            mask: (batch, length), 0 for padding. None has no padding.

        Returns:
            False, and nothing is changed, where that cannot be done.
        """
        if len(ids) != len(self.ids):
            return False
        most = min(self.ids.shape[1], ids.shape[1] - 1)
        real = (torch.ones_like(ids) if mask is None else mask).bool()[:, :most]
        mine, known = self.ids[:, :most], self.real[:, :most]
        same = (real == known) & ((ids[:, :most] == mine) | ~known)
        kept = int(same.all(0).long().cumprod(0).sum())
        if kept < self.ids.shape[1] and not graph.rewind(self.state, kept):
            return False
        self.ids, self.real = self.ids[:, :kept], self.real[:, :kept]
        return True


def new_tokens(
    graph: Graph,
    ids: Tensor,
    limit: int,
    sampling: Sampling,
    stop: Collection[int],
    *,
    pad: int = 0,
    mask: Tensor | None = None,
    reading: Reading | None = None,
    ended: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The tokens, int64 (batch,), that follow ``ids``, step by step until every sequence has ended.

    Args:
        graph: the model.
        ids: int64 (batch, length); padding stands in front.
        limit: how many steps at most.
        sampling: how each token is chosen.
        stop: the tokens that end a sequence. They are returned themselves.
        pad: what is returned for a sequence that has ended while others go on.
        mask: int64 (batch, length), 0 for padding, for a graph that takes one. None has no padding.
        reading: what has been read before, which is advanced; None begins with an empty cache.
        ended: says of all tokens so far, (batch, length), which sequences end with them, bool (batch,).

    Raises:
        ConfigError: no token is left to choose.
    """
    generator = torch.Generator("cpu").manual_seed(sampling.seed)
    reading = Reading.begun(graph, len(ids)) if reading is None else reading
    done = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device="cpu")
    # GroupQueryAttention takes several tokens on top of a cache for one sequence only
    size = PROMPT_CHUNK if len(ids) == 1 else 1 if reading.ids.numel() else ids.shape[1]
    for start in range(0, ids.shape[1], size):
        part = None if mask is None else mask[:, start : start + size]
        logits = reading.read(graph, ids[:, start : start + size], part)
    for count in range(1, limit + 1):
        chosen = sampling.choose(logits, Said(reading.ids, reading.real, count - 1, stop), generator)
        chosen[done] = pad
        yield chosen
        done |= torch.isin(chosen, ends)
        if ended is not None:
            done |= ended(torch.cat([reading.ids, chosen[:, None]], 1))
        if bool(done.all()) or count == limit:
            return
        logits = reading.read(graph, chosen[:, None])

"""The loop of generation: prompt, token, token, ... for a batch of sequences of one length.

All decoders of the package run it, each over a :class:`Graph` of its own runtime. What is asked of them is told in
:mod:`.ort_model` (``generate`` as transformers has it) and :mod:`.decoder` (one sequence, with times and logits).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

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


def new_tokens(
    graph: Graph,
    ids: Tensor,
    limit: int,
    sampling: Sampling,
    stop: Collection[int],
    pad: int = 0,
    mask: Tensor | None = None,
    state: Any = None,
) -> Iterator[Tensor]:
    """The tokens, int64 (batch,), that follow ``ids``, step by step until every sequence has met a token of ``stop``.

    Args:
        graph: the model.
        ids: int64 (batch, length); padding stands in front.
        limit: how many steps at most.
        sampling: how each token is chosen.
        stop: the tokens that end a sequence. They are returned themselves.
        pad: what is returned for a sequence that has ended while others go on.
        mask: int64 (batch, length), 0 for padding, for a graph that takes one. None has no padding.
        state: what has been read before, which is advanced; None begins with an empty cache.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    state = graph.start(len(ids)) if state is None else state
    done = torch.zeros(len(ids), dtype=torch.bool)
    ends = torch.tensor(sorted(stop), dtype=torch.int64)
    # GroupQueryAttention takes several tokens on top of a cache for one sequence only
    size = PROMPT_CHUNK if len(ids) == 1 else ids.shape[1]
    for start in range(0, ids.shape[1], size):
        part = None if mask is None else mask[:, start : start + size]
        logits = graph.step(ids[:, start : start + size], state, part)[:, -1].float()
    for count in range(1, limit + 1):
        chosen = torch.tensor([sampling.choose(row, generator) for row in logits])
        chosen[done] = pad
        yield chosen
        done |= torch.isin(chosen, ends)
        if bool(done.all()) or count == limit:
            return
        logits = graph.step(chosen[:, None], state)[:, -1].float()

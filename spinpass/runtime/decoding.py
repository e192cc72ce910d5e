"""The loop of generation: prompt, token, token, ... for a batch of sequences of one length."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .sampling import Sampling

PROMPT_CHUNK = 512
"""Tokens per call while one sequence's prompt is read: bounds the memory of the logits."""


class Graph(Protocol):
    """A model with a KV cache in some runtime."""

    def start(self, batch: int, /) -> Any:
        """The state before the first token of so many sequences."""

    def step(self, ids: Tensor, state: Any, /) -> Tensor:
        """Read new tokens (batch, length), advance ``state``; their logits (batch, length, vocabulary)."""


def new_tokens(
    graph: Graph, ids: Tensor, limit: int, sampling: Sampling, stop: Collection[int], pad: int = 0
) -> Iterator[Tensor]:
    """The tokens (batch,) that follow ``ids`` (batch, length), up to ``limit`` of each; a sequence that met a token of
    ``stop`` (which is returned) goes on with ``pad``, and all end when every one has.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    state = graph.start(len(ids))
    done = torch.zeros(len(ids), dtype=torch.bool)
    ends = torch.tensor(sorted(stop), dtype=torch.int64)
    # GroupQueryAttention takes several tokens on top of a cache for one sequence only
    for part in torch.split(ids, PROMPT_CHUNK if len(ids) == 1 else ids.shape[1], 1):
        logits = graph.step(part, state)[:, -1].float()
    for count in range(1, limit + 1):
        chosen = torch.tensor([sampling.choose(row, generator) for row in logits])
        chosen[done] = pad
        yield chosen
        done |= torch.isin(chosen, ends)
        if bool(done.all()) or count == limit:
            return
        logits = graph.step(chosen[:, None], state)[:, -1].float()

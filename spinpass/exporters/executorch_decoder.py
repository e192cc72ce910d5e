"""Text out of a .pte file: a decoder with its KV cache inside, on ExecuTorch's runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.runtime import Decoder, check_start

from .executorch import pte_path
from .executorch_session import PteMethod


@dataclass
class _State:
    """How many tokens the cache holds. The cache itself lies in the method: a new text is written over the old one."""

    length: int = 0


class PteDecoder(Decoder):
    """A file, or a folder with ``model.pte``, whose program takes ``input_ids`` (1, n) and ``cache_position`` (n,) and
    returns logits (1, n, vocabulary): what :func:`.static_cache.export_static_cache` makes, and ExecuTorch's own
    text runners take. ``context``: how many tokens fit into its cache.

    Raises ExportError: no model there, ExecuTorch cannot load it, or it takes other inputs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = pte_path(path)
        self._method = PteMethod(self.path)
        shapes = self._method.input_shapes
        if len(shapes) != 2 or len(shapes[0]) != 2 or len(shapes[1]) != 1 or shapes[0][0] != 1:
            raise ExportError(
                f"{self.path} takes inputs of shapes {shapes}: token ids (1, n) and their positions (n,) are expected, "
                "with the cache inside; export the program that spinpass.exporters.static_cache makes"
            )
        self.context = shapes[0][1]

    def _empty(self, ids: Sequence[int]) -> _State:
        check_start(ids)
        return _State()

    def _step(self, ids: Sequence[int], state: _State) -> Tensor:
        stop = state.length + len(ids)
        if stop > self.context:
            raise ConfigError(
                f"{stop} tokens do not fit into the cache of {self.context}: shorten the text, or export with a longer "
                "context"
            )
        logits: Tensor = self._method.run([torch.tensor([list(ids)]), torch.arange(state.length, stop)])[0]
        state.length = stop
        return logits[0]

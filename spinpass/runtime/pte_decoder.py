"""Text out of a .pte file: a decoder with its KV cache inside, on ExecuTorch's runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import pte_path

from .decoder import Decoder
from .executorch_session import PteMethod


class PteDecoder(Decoder):
    """A decoder in ExecuTorch.

    Its program takes ``input_ids`` (1, n) and ``cache_position`` (n,) and returns logits (1, n, vocabulary), as
    :func:`spinpass.loading.export_static_cache` makes it, and ExecuTorch's own text runners take it.

    Args:
        path: of the file, or of a folder with ``model.pte``.

    Attributes:
        context: how many tokens fit into its cache.

    Raises:
        ExportError: no model is there, ExecuTorch cannot load it, or it takes other inputs.
    """

    def __init__(self, path: str | Path) -> None:
        file = pte_path(path)
        graph = _PteGraph.open(file)
        self.context = graph.context
        super().__init__(file, graph)


@dataclass
class _State:
    """How many tokens the cache holds. The cache itself lies in the method: a new text is written over the old one."""

    length: int = 0


@dataclass(frozen=True)
class _PteGraph:
    """The program as a :class:`.decoding.Graph`."""

    method: PteMethod
    context: int

    @staticmethod
    def open(path: Path) -> _PteGraph:
        method = PteMethod(path)
        shapes = method.input_shapes
        if len(shapes) != 2 or len(shapes[0]) != 2 or len(shapes[1]) != 1 or shapes[0][0] != 1:
            raise ExportError(
                f"{path} takes inputs of shapes {shapes}: token ids (1, n) and their positions (n,) are expected, "
                "with the cache inside; export the program that spinpass.loading.static_cache makes"
            )
        return _PteGraph(method, shapes[0][1])

    def start(self, batch: int) -> _State:
        if batch != 1:
            raise ConfigError(f"the cache inside holds one sequence, not {batch}: run them one after the other")
        return _State()

    def step(self, ids: Tensor, state: _State, mask: Tensor | None = None) -> Tensor:
        if mask is not None and not bool(mask.all()):
            raise ConfigError("the program takes no attention mask: run a text without padding")
        stop = state.length + ids.shape[1]
        if stop > self.context:
            raise ConfigError(
                f"{stop} tokens do not fit into the cache of {self.context}: shorten the text, or export with a longer "
                "context"
            )
        logits: Tensor = self.method.run([ids, torch.arange(state.length, stop, device="cpu")])[0]
        state.length = stop
        return logits

    def rewind(self, state: _State, length: int) -> bool:
        """Forget all but the first ``length`` tokens: what comes next is written over them."""
        state.length = length
        return True

"""Text out of an exported folder: decoders with a KV cache.

``OrtModel`` generates as transformers does. ``OrtDecoder`` is for trying an export and for measuring it, one sequence
at a time: it returns times, and logits of every position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError

from . import decoding
from .model_folder import ModelFolder
from .onnx_graph import DecoderGraph
from .ort_model import OrtModel
from .sampling import Sampling

__all__ = ["Decoder", "Generation", "OrtDecoder", "OrtModel", "Sampling"]


@dataclass(frozen=True)
class Generation:
    """What :meth:`Decoder.generate` returns: the new tokens without the prompt, and wall-clock times.

    ``decode_seconds`` covers the calls of one token each, ``decoded`` how many there were; ``finished`` is whether an
    end token came.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    decoded: int
    decode_seconds: float
    finished: bool

    @property
    def prefill_rate(self) -> float:
        """Tokens per second while reading the prompt."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second while writing; 0 if nothing was decoded."""
        return self.decoded / self.decode_seconds if self.decoded else 0.0


class Decoder:
    """A model file that a runtime has loaded as ``graph``, and what lies beside it: for text a tokenizer and
    ``generation_config.json`` or ``config.json``. One sequence at a time.
    """

    def __init__(self, path: Path, graph: decoding.Graph) -> None:
        self.path, self._graph, self._files = path, graph, ModelFolder(path.parent)

    @property
    def folder(self) -> Path:
        return self.path.parent

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (length, vocabulary) of every position, float32, from an empty cache. ConfigError for an empty
        sequence, ExportError where the file returns the last position's alone."""
        state = self._graph.start(1)
        parts = torch.split(_tensor(ids), decoding.PROMPT_CHUNK, 1)
        found = torch.cat([self._graph.step(part, state)[0] for part in parts]).float()
        if len(found) != len(ids):
            raise ExportError(
                f"{self.path} returns the logits of the last token alone: export it without --last-logits to score it"
            )
        return found

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        end: Collection[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Generation:
        """Continue ``ids``, greedily unless ``sampling`` says otherwise, up to an end token (included in the result) or
        the limit.

        ``end`` defaults to :attr:`end_tokens`; ``on_token`` is called with every new token as it comes. Raises
        ConfigError for an empty prompt or a limit below 1.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} is less than 1")
        stop = self.end_tokens if end is None else frozenset(end)
        prompt = _tensor(ids)
        tokens: list[int] = []
        began = started = time.perf_counter()
        for token in decoding.new_tokens(self._graph, prompt, max_new_tokens, sampling or Sampling(), stop):
            if not tokens:
                started = time.perf_counter()
            tokens.append(int(token))
            if on_token is not None:
                on_token(tokens[-1])
        seconds = time.perf_counter() - started
        return Generation(tuple(tokens), len(ids), started - began, len(tokens) - 1, seconds, tokens[-1] in stop)

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, loaded with transformers. ExportError if there is none or transformers is missing."""
        return self._files.tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """``eos_token_id`` of generation_config.json or config.json; none if neither names one."""
        return self._files.end_tokens

    def check_length(self, prompt: int, new: int) -> None:
        """ConfigError where so many tokens are more than the model has positions for."""
        self._files.check_length(prompt, new)


class OrtDecoder(Decoder):
    """A folder with ``model.onnx``, in ONNX Runtime.

    The graph takes token ids, optionally ``position_ids``, ``cache_position`` and ``attention_mask``, and a cache of
    dynamic length; it returns logits first and then the cache.

    Raises:
        ExportError: no model there, ONNX Runtime cannot load it, or the graph has no cache of dynamic length.
        VerificationError: its rotations are not those that it or ``spinpass.json`` beside it names.
        ConfigError: ONNX Runtime does not have ``provider``.
    """

    def __init__(
        self, folder: str | Path, *, provider: str = "CPUExecutionProvider", threads: int | None = None
    ) -> None:
        from spinpass.formats import model_path

        path = model_path(folder)
        super().__init__(path, DecoderGraph.open(path, provider, threads))


def _tensor(ids: Sequence[int]) -> Tensor:
    """(1, length). ConfigError where there is nothing."""
    if not len(ids):
        raise ConfigError("there are no tokens to start from: give at least one")
    return torch.tensor([list(ids)], dtype=torch.int64)

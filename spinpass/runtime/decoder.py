"""Decoders with a KV cache to try an exported file and to measure it: one sequence at a time, with times and logits.

``Decoder`` is what they share; the file of ONNX Runtime is an ``OrtDecoder``, that of ExecuTorch a
:class:`.pte_decoder.PteDecoder`. For ``generate`` as transformers has it, on batches, see :mod:`.ort_model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import model_path

from . import decoding
from .model_folder import ModelFolder
from .onnx_graph import DecoderGraph
from .sampling import Sampling


@dataclass(frozen=True)
class Generation:
    """What :meth:`Decoder.generate` returns.

    Args:
        tokens: the new ones, without the prompt.
        prompt_tokens: how many tokens the prompt has.
        prefill_seconds: the wall-clock time until the first new token.
        decoded: how many calls of one token each followed.
        decode_seconds: their wall-clock time.
        finished: an end token came, or it was stopped.
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
        """Tokens per second while writing, or 0 if nothing was decoded."""
        return self.decoded / self.decode_seconds if self.decoded else 0.0


class Decoder:
    """A model file that a runtime has loaded as ``graph``, and what lies beside it, for one sequence at a time.

    Beside the file text needs a tokenizer, and ``generation_config.json`` or ``config.json``.
    """

    def __init__(self, path: Path, graph: decoding.Graph) -> None:
        self.path, self.graph, self._files = path, graph, ModelFolder(path.parent)

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return self.path.parent

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits of every position, float32 (length, vocabulary), from an empty cache.

        Raises:
            ConfigError: the sequence is empty.
            ExportError: the file returns the logits of the last position alone, and cannot be read otherwise.
        """
        graph = self._scored
        state = graph.start(1)
        parts = torch.split(_tensor(ids), decoding.PROMPT_CHUNK, 1)
        found = torch.cat([graph.step(part, state)[0] for part in parts]).float()
        if len(found) != len(ids):
            raise ExportError(
                f"{self.path} returns the logits of the last token alone: export it with --all-logits to score it"
            )
        return found

    @property
    def _scored(self) -> decoding.Graph:
        """What returns the logits of every token."""
        return self.graph

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        end: Collection[int] | None = None,
        on_token: Callable[[int], object] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Continue a prompt up to an end token, which is part of the result, or the limit.

        Args:
            ids: the tokens of the prompt.
            max_new_tokens: the limit.
            sampling: how each token is chosen. None takes the likeliest.
            end: the end tokens. None takes :attr:`end_tokens`.
            on_token: called with every new token as it comes.
            stopped: asked after every token whether it was the last.

        Raises:
            ConfigError: the prompt is empty, the limit is below 1, or the penalties leave no token to choose.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} is less than 1")
        stop = self.end_tokens if end is None else frozenset(end)
        prompt = _tensor(ids)
        tokens: list[int] = []
        began = started = time.perf_counter()
        for token in decoding.new_tokens(self.graph, prompt, max_new_tokens, sampling or Sampling(), stop):
            if not tokens:
                started = time.perf_counter()
            tokens.append(int(token))
            if on_token is not None:
                on_token(tokens[-1])
            if ended := stopped():
                break
        seconds = time.perf_counter() - started
        finished = ended or tokens[-1] in stop
        return Generation(tuple(tokens), len(ids), started - began, len(tokens) - 1, seconds, finished)

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, see :attr:`.ModelFolder.tokenizer`."""
        return self._files.tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """The folder's end tokens, see :attr:`.ModelFolder.end_tokens`."""
        return self._files.end_tokens

    def check_length(self, prompt: int, new: int) -> None:
        """Check a length, see :meth:`.ModelFolder.check_length`."""
        self._files.check_length(prompt, new)


class OrtDecoder(Decoder):
    """A decoder in ONNX Runtime.

    Its graph takes token ids, optionally ``position_ids``, ``cache_position`` and ``attention_mask``, and a cache of
    dynamic length. It returns logits first and then the cache.

    Args:
        folder: one with ``model.onnx``, or the ``.onnx`` file itself.
        provider: ONNX Runtime's name of what computes.
        threads: how many of the CPU. None leaves the number to ONNX Runtime.

    Raises:
        ExportError: no model is there, ONNX Runtime cannot load it, or the graph has no cache of dynamic length.
        VerificationError: its rotations are not those that it or ``spinpass.json`` beside it names.
        ConfigError: ONNX Runtime does not have ``provider``.
    """

    def __init__(
        self, folder: str | Path, *, provider: str = "CPUExecutionProvider", threads: int | None = None
    ) -> None:
        path = model_path(folder)
        self._opened = DecoderGraph.open(path, provider, threads)
        super().__init__(path, self._opened)

    @cached_property
    def _scored(self) -> decoding.Graph:
        return self._opened.of_every_token(self.path) if self._opened.last_alone else self._opened


def _tensor(ids: Sequence[int]) -> Tensor:
    """The tokens as int64 (1, length). Raises ConfigError where there are none."""
    if not len(ids):
        raise ConfigError("there are no tokens to start from: give at least one")
    return torch.tensor([list(ids)], dtype=torch.int64, device="cpu")

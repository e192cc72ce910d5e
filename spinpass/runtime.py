"""Text out of an exported folder: a decoder with a KV cache in ONNX Runtime.

``OrtDecoder`` reads the names and shapes of the graph and nothing about the model: which inputs are the cache, which
output continues which of them, which axis grows. It is for trying an export and for measuring it, one sequence at a
time.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError, ExportError

_PROMPT_CHUNK = 512  # tokens per call while reading the prompt: bounds the memory of the logits
_PREFIX = re.compile(r"^(input\.|output\.)?(past_key_values|present_key_values|past|present)?")


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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 restrict
    nothing.

    Raises ConfigError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature} is negative")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is not in (0, 1]")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token for float logits of shape (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled, tokens = (logits.double() / self.temperature).sort(descending=True)
        probabilities = scaled.softmax(-1)
        if self.top_k:
            probabilities[self.top_k :] = 0
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= self.top_p * probabilities.sum()] = 0
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


class Decoder(ABC):
    """A model file that reads and writes text, one sequence at a time. ``path``: the file; what belongs to it
    (tokenizer, ``generation_config.json`` or ``config.json``) lies beside it."""

    path: Path

    @abstractmethod
    def _empty(self, ids: Sequence[int]) -> Any:
        """The state before the first token of a text that begins with ``ids``; ConfigError where there is none."""

    @abstractmethod
    def _step(self, ids: Sequence[int], state: Any) -> Tensor:
        """Read new tokens, advance ``state``, return their logits (length, vocabulary)."""

    @property
    def folder(self) -> Path:
        return self.path.parent

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (length, vocabulary) of every position, float32, from an empty cache. ConfigError for an empty
        sequence."""
        state = self._empty(ids)
        return torch.cat([self._step(part, state) for part in _chunks(ids)]).float()

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
        choose = sampling or Sampling()
        generator = torch.Generator().manual_seed(choose.seed)
        stop = self.end_tokens if end is None else frozenset(end)
        state = self._empty(ids)
        began = time.perf_counter()
        for part in _chunks(ids):
            last = self._step(part, state)[-1]
        started = time.perf_counter()
        tokens: list[int] = []
        while True:
            tokens.append(choose.choose(last.float(), generator))
            if on_token is not None:
                on_token(tokens[-1])
            if tokens[-1] in stop or len(tokens) == max_new_tokens:
                break
            last = self._step(tokens[-1:], state)[-1]
        seconds = time.perf_counter() - started
        return Generation(tuple(tokens), len(ids), started - began, len(tokens) - 1, seconds, tokens[-1] in stop)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, loaded with transformers. ExportError if there is none or transformers is missing."""
        if not any(
            (self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        ):
            raise ExportError(f"{self.folder} holds no tokenizer: save one there with tokenizer.save_pretrained")
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise ExportError(
                f"text needs the package {error.name}: pip install transformers, or pass token ids"
            ) from error
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """``eos_token_id`` of generation_config.json or config.json; none if neither names one."""
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
        return frozenset()


class OrtDecoder(Decoder):
    """A model folder (``model.onnx``, and for text a tokenizer and ``generation_config.json`` or ``config.json``) ready
    to run.

    The graph takes token ids, optionally ``position_ids``, ``cache_position`` and ``attention_mask``, and a cache of
    dynamic length; it returns logits first and then the cache.

    Raises:
        ExportError: no model there, ONNX Runtime cannot load it, or the graph has no cache of dynamic length.
        ConfigError: ONNX Runtime does not have ``provider``.
    """

    def __init__(
        self, folder: str | Path, *, provider: str = "CPUExecutionProvider", threads: int | None = None
    ) -> None:
        from spinpass.exporters import onnx_session
        from spinpass.exporters.onnx_paths import model_path

        self.path = model_path(folder)
        if not self.path.is_file():
            raise ExportError(f"there is no model at {self.path}")
        self._ort = onnx_session
        self._session = onnx_session.open_session(self.path, provider, threads)
        self._graph = _Graph.of(self._session, self.path)

    def _empty(self, ids: Sequence[int]) -> _State:
        check_start(ids)
        cache = {slot.name: self._ort.to_ort(torch.zeros(slot.empty, dtype=slot.dtype)) for slot in self._graph.cache}
        return _State(0, cache)

    def _step(self, ids: Sequence[int], state: _State) -> Tensor:
        """Run the graph on new tokens, advance ``state``, return their logits (length, vocabulary)."""
        start, stop = state.length, state.length + len(ids)
        given = {
            self._graph.ids: torch.tensor([list(ids)]),
            "position_ids": torch.arange(start, stop)[None],
            "cache_position": torch.arange(start, stop),
            "attention_mask": torch.ones(1, stop, dtype=torch.int64),
        }
        feed = {name: self._ort.to_ort(given[name].to(dtype)) for name, dtype in self._graph.plain.items()}
        results = self._ort.run(self._session, feed | state.cache)
        state.length = stop
        state.cache = {slot.name: results[slot.output] for slot in self._graph.cache}
        return self._ort.from_ort(results[self._graph.logits])[0]


@dataclass
class _State:
    """What lies between two calls: the number of tokens seen, and the cache as ONNX Runtime returned it."""

    length: int
    cache: dict[str, Any]


@dataclass(frozen=True)
class _Slot:
    """One cache input, its shape when empty, and the index of the output that continues it."""

    name: str
    empty: tuple[int, ...]
    dtype: torch.dtype
    output: int


@dataclass(frozen=True)
class _Graph:
    """The roles of a decoder graph's inputs and outputs. ``plain`` maps the inputs that are made anew at every call to
    their types."""

    ids: str
    plain: dict[str, torch.dtype]
    logits: int
    cache: tuple[_Slot, ...]

    @staticmethod
    def of(session: Any, path: Path) -> _Graph:
        from spinpass.exporters.onnx_session import DTYPES

        inputs, outputs = session.get_inputs(), session.get_outputs()
        stored = [i for i in inputs if len(i.shape) >= 3]
        plain = {i.name: DTYPES[i.type] for i in inputs if len(i.shape) < 3}
        known = {"position_ids", "cache_position", "attention_mask"}
        ids = [name for name in plain if name not in known]
        if len(ids) != 1:
            raise ExportError(
                f"{path} takes {', '.join(plain) or 'no tokens'}: one input of token ids is expected beside {known}"
            )
        if not stored:
            raise ExportError(
                f"{path} has no cache inputs: export the graph that decodes, with the cache as inputs and outputs"
            )
        names = [output.name for output in outputs]
        logits = names.index("logits") if "logits" in names else 0
        continued = _continuations([i.name for i in stored], names, logits, path)
        batch = next(i for i in inputs if i.name == ids[0]).shape[0]
        if isinstance(batch, int) and batch != 1:
            raise ExportError(f"{path} was exported for batches of {batch}: export it with a dynamic batch axis")
        slots = (_Slot(i.name, _empty_shape(i, batch, path), DTYPES[i.type], continued[i.name]) for i in stored)
        return _Graph(ids[0], plain, logits, tuple(slots))


def _continuations(stored: list[str], outputs: list[str], logits: int, path: Path) -> dict[str, int]:
    """Cache input -> index of its output: by name where the names agree but for what says in or out, else in order."""
    rest = [i for i in range(len(outputs)) if i != logits]
    by_suffix = {_PREFIX.sub("", outputs[i]): i for i in rest}
    if len(by_suffix) == len(rest) and all(_PREFIX.sub("", name) in by_suffix for name in stored):
        return {name: by_suffix[_PREFIX.sub("", name)] for name in stored}
    if len(stored) != len(rest):
        raise ExportError(f"{path} takes {len(stored)} cache tensors and returns {len(rest)}: they cannot be matched")
    return dict(zip(stored, rest, strict=True))


def _empty_shape(value: Any, batch: int | str, path: Path) -> tuple[int, ...]:
    """Batch 1, no tokens: the dynamic axes that are not the batch are the length."""
    shape = tuple(1 if size == batch else 0 if isinstance(size, str) else size for size in value.shape)
    if 0 not in shape:
        raise ExportError(
            f"{path}: the cache {value.name} of shape {value.shape} has a fixed length: export it with a dynamic one"
        )
    return shape


def check_start(ids: Sequence[int]) -> None:
    """ConfigError for an empty sequence."""
    if not len(ids):
        raise ConfigError("there are no tokens to start from: give at least one")


def _chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[i : i + _PROMPT_CHUNK] for i in range(0, len(ids), _PROMPT_CHUNK)]

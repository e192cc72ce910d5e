"""A decoder's ONNX graph with a KV cache, read from its names and shapes: which input is what, and how a step is run.

Nothing is known about the model. Which inputs are the cache, which output continues which of them and which axis grows
is what the graph says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ExportError
from spinpass.formats import CACHE_BUFFERS, READS_PADDING, check_loaded, finish

CPU = "CPUExecutionProvider"
_ROOM = 256  # tokens that a cache has room for at first
_STATE = re.compile(r"\.state(\.\d+)?$")
_PREFIX = re.compile(r"^(input\.|output\.)?(past_key_values|present_key_values|past|present)?")


@dataclass
class State:
    """What lies between two calls: which tokens were read, int64 (batch, length) with 0 for padding, and the cache as
    ONNX Runtime has it, which may be longer than what was read (:meth:`DecoderGraph.held`)."""

    mask: Tensor
    cache: dict[str, Any]

    def copied(self) -> State:
        """The same, to go on from twice: no step and no rewinding of the one changes the other."""
        from .onnx_session import from_ort, to_ort

        return State(self.mask, {name: to_ort(from_ort(value).clone()) for name, value in self.cache.items()})


@dataclass(frozen=True)
class _Slot:
    """One cache input, its shape when empty (-1 for the batch), and the index of the output that continues it."""

    name: str
    empty: tuple[int, ...]
    dtype: torch.dtype
    output: int

    @property
    def axis(self) -> int | None:
        """That of the tokens; None for a state that does not grow."""
        return self.empty.index(0) if 0 in self.empty else None


@dataclass(frozen=True)
class DecoderGraph:
    """A decoder's graph in ONNX Runtime, and the roles of its inputs and outputs.

    Args:
        session: what runs it.
        ids: the name of the input of token ids.
        plain: the dtypes of the inputs that are made anew at every call, by name.
        logits: the index of the output that has them.
        cache: the inputs of the cache.
        one_by_one: the graph takes one token of each sequence at a call.
        reads_padding: padding changes what it makes of a text, though a mask closes it.
        last_alone: the logits are those of the last token, however many it reads.
        in_place: a cache may be longer than what is in it, and attention writes into it.
    """

    session: Any
    ids: str
    plain: dict[str, torch.dtype]
    logits: int
    cache: tuple[_Slot, ...]
    one_by_one: bool = False
    reads_padding: bool = False
    last_alone: bool = False
    in_place: bool = False

    @staticmethod
    def open(path: Path, provider: str = CPU, threads: int | None = None) -> DecoderGraph:
        """Load a file.

        Args:
            path: of the file.
            provider: ONNX Runtime's name of what computes.
            threads: how many of the CPU. None leaves the number to ONNX Runtime.

        Raises:
            ExportError: no file is there, ONNX Runtime cannot load it or lacks an operator, the graph has no cache of
                dynamic length, or an export was killed while it moved its files there and cannot be finished.
            VerificationError: its rotations are not those that it or ``spinpass.json`` beside it names.
            ConfigError: ONNX Runtime does not have ``provider``.
        """
        from .onnx_session import open_session

        finish(path)
        if not path.is_file():
            raise ExportError(f"there is no model at {path}")
        session = open_session(path, provider, threads)
        about = session.get_modelmeta().custom_metadata_map
        check_loaded(path, about)
        in_place = CACHE_BUFFERS in about and provider == CPU  # other devices would copy it to and fro
        return replace(DecoderGraph.of(session, path), reads_padding=READS_PADDING in about, in_place=in_place)

    def of_every_token(self, path: Path) -> DecoderGraph:
        """The graph of the same file with the logits of every token, see :mod:`.every_token`.

        Raises ExportError where the file has no step that picks the last one.
        """
        from .every_token import every_token_model
        from .onnx_session import open_session

        logits = self.session.get_outputs()[self.logits].name
        threads = self.session.get_session_options().intra_op_num_threads
        whole = every_token_model(path, logits)
        session = open_session(path, self.session.get_providers()[0], threads, model=whole)
        return replace(self, session=session, last_alone=False)

    @staticmethod
    def of(session: Any, path: Path) -> DecoderGraph:
        """The graph of an open session of the file at ``path``.

        Raises:
            ExportError: it is not that of a decoder with a cache of dynamic length.
        """
        from .onnx_session import DTYPES

        inputs, outputs = session.get_inputs(), session.get_outputs()
        # a counter has no axes, and some states have two, as token ids do
        stored = [i for i in inputs if len(i.shape) >= 3 or not i.shape or is_state(i.name)]
        plain = {i.name: DTYPES[i.type] for i in inputs if i not in stored}
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
        continued = continuations([i.name for i in stored], names, logits, path)
        batch, length = map(_size, next(i for i in inputs if i.name == ids[0]).shape)
        if isinstance(batch, int) and batch != 1:
            raise ExportError(f"{path} was exported for batches of {batch}: export it with a dynamic batch axis")
        if isinstance(length, int) and length != 1:
            raise ExportError(f"{path} was exported for {length} tokens at a call: export it with a dynamic length")
        slots = (_Slot(i.name, _empty_shape(i, batch, path), DTYPES[i.type], continued[i.name]) for i in stored)
        returned = outputs[logits].shape
        last_alone = length != 1 and len(returned) == 3 and _size(returned[1]) == 1
        return DecoderGraph(session, ids[0], plain, logits, tuple(slots), length == 1, last_alone=last_alone)

    def start(self, batch: int) -> State:
        """The state with an empty cache for so many sequences."""
        from .onnx_session import to_ort

        empty = {slot.name: tuple(batch if size == -1 else size for size in slot.empty) for slot in self.cache}
        nothing = torch.ones(batch, 0, dtype=torch.int64, device="cpu")
        return State(
            nothing, {s.name: to_ort(torch.zeros(empty[s.name], dtype=s.dtype, device="cpu")) for s in self.cache}
        )

    @property
    def takes_padding(self) -> bool:
        """Whether rows of different length can be run together: the graph is told which tokens are padding, and padding
        changes nothing then."""
        return "attention_mask" in self.plain and not self.reads_padding

    def step(self, ids: Tensor, state: State, mask: Tensor | None = None) -> Tensor:
        """Read new tokens (batch, length) and advance ``state``. Returns logits (batch, length, vocabulary).

        The cache goes from call to call as ONNX Runtime made it, without a copy, or is written to where it lies.

        Args:
            ids: int64 (batch, length).
            state: what :meth:`start` or an earlier step left.
            mask: int64 (batch, length), 0 for padding; it is for graphs that take an attention mask. None has no
                padding.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        from .onnx_session import from_ort, run_in_place, run_session, to_ort

        if self.one_by_one and ids.shape[1] > 1:
            marks = torch.ones_like(ids) if mask is None else mask
            places = range(ids.shape[1])
            return torch.cat([self.step(ids[:, i : i + 1], state, marks[:, i : i + 1]) for i in places], 1)
        start = state.mask.shape[1]
        state.mask = torch.cat([state.mask, torch.ones_like(ids) if mask is None else mask], 1)
        given = {
            self.ids: ids,
            "position_ids": (state.mask.cumsum(1) - 1).clamp(min=0)[:, start:],
            "cache_position": torch.arange(start, state.mask.shape[1], device="cpu"),
            "attention_mask": state.mask,
        }
        feed = {name: to_ort(given[name].to(dtype)) for name, dtype in self.plain.items()}
        if self.in_place:
            self._make_room(state, start)
            names = self._outputs
            written = {names[slot.output]: state.cache[slot.name] for slot in self.cache}
            return from_ort(run_in_place(self.session, feed | state.cache, written, names[self.logits]))
        results = run_session(self.session, feed | state.cache)
        state.cache = {slot.name: results[slot.output] for slot in self.cache}
        return from_ort(results[self.logits])

    @cached_property
    def _outputs(self) -> list[str]:
        """The names of the outputs, which are asked for at every step."""
        return [output.name for output in self.session.get_outputs()]

    def _make_room(self, state: State, known: int) -> None:
        """Put caches that are too short for all tokens of the mask into longer ones; ``known`` tokens are in them."""
        from .onnx_session import from_ort, to_ort

        needed = state.mask.shape[1]
        for slot in self.cache:
            assert slot.axis is not None  # a cache that grows
            shape = list(state.cache[slot.name].shape())
            room = shape[slot.axis]
            if room >= needed:
                continue
            shape[slot.axis] = max(needed, 2 * room, _ROOM)
            longer = torch.zeros(shape, dtype=slot.dtype, device="cpu")
            before = from_ort(state.cache[slot.name])
            longer.narrow(slot.axis, 0, known).copy_(before.narrow(slot.axis, 0, known))
            state.cache[slot.name] = to_ort(longer)

    def held(self, state: State) -> dict[str, Tensor]:
        """What a cache holds, by the name of its input, without the room behind it."""
        from .onnx_session import from_ort

        found = {slot: from_ort(state.cache[slot.name]) for slot in self.cache}
        if not self.in_place:
            return {slot.name: value for slot, value in found.items()}
        return {slot.name: value.narrow(slot.axis or 0, 0, state.mask.shape[1]) for slot, value in found.items()}

    def rewind(self, state: State, length: int) -> bool:
        """Forget all but the first ``length`` tokens.

        Returns False, and changes nothing, where that cannot be done: the states of recurrent layers know no earlier
        ones, and a window may have dropped them.
        """
        from .onnx_session import from_ort, to_ort

        known = state.mask.shape[1]
        if self.in_place:  # what comes next is written over it
            state.mask = state.mask[:, :length]
            return True
        values = {slot.name: from_ort(state.cache[slot.name]) for slot in self.cache}
        axes = {slot.name: slot.axis for slot in self.cache}
        if any(axis is None or values[name].shape[axis] != known for name, axis in axes.items()):
            return False
        for name, axis in axes.items():
            assert axis is not None
            state.cache[name] = to_ort(values[name].narrow(axis, 0, length).contiguous())
        state.mask = state.mask[:, :length]
        return True


def is_state(name: str) -> bool:
    """Whether an input of this name is the state of a layer, whatever its axes."""
    return bool(_STATE.search(name))


def continuations(stored: list[str], outputs: list[str], logits: int, path: Path) -> dict[str, int]:
    """By cache input, the index of its output: by name where names agree but for what says in or out, else in order.

    Raises ExportError where their numbers differ.
    """
    rest = [i for i in range(len(outputs)) if i != logits]
    by_suffix = {_PREFIX.sub("", outputs[i]): i for i in rest}
    if len(by_suffix) == len(rest) and all(_PREFIX.sub("", name) in by_suffix for name in stored):
        return {name: by_suffix[_PREFIX.sub("", name)] for name in stored}
    if len(stored) != len(rest):
        raise ExportError(f"{path} takes {len(stored)} cache tensors and returns {len(rest)}: they cannot be matched")
    return dict(zip(stored, rest, strict=True))


def _empty_shape(value: Any, batch: int | str, path: Path) -> tuple[int, ...]:
    """The shape of a cache input without tokens, -1 for the batch. Its other dynamic axes are the length, which keys
    and values have. The states of recurrent layers and convolutions have none: they begin as zeros."""
    shape = tuple(-1 if size == batch else 0 if isinstance(size, str) else size for size in map(_size, value.shape))
    if 0 not in shape and value.shape and not is_state(value.name):
        raise ExportError(
            f"{path}: the cache {value.name} of shape {value.shape} has a fixed length: export it with a dynamic one"
        )
    return shape


def _size(stated: int | str) -> int | str:
    """The size of an axis. Some exporters write the number of a fixed axis as a name."""
    return int(stated) if str(stated).isdecimal() else stated

"""Text out of an OpenVINO model: a decoder whose KV cache goes in and comes out, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spinpass.errors import ExportError
from spinpass.formats import finish, xml_path

from .decoder import Decoder
from .onnx_graph import continuations, is_state
from .openvino_session import CompiledModel


class OpenVINODecoder(Decoder):
    """A decoder in OpenVINO.

    Its model takes token ids, optionally ``position_ids``, ``cache_position`` and ``attention_mask``, and a cache of
    dynamic length. It returns logits and the cache, as ``spinpass export --to openvino`` writes it.

    Args:
        path: of the ``.xml`` file, or of a folder with ``openvino_model.xml``.
        threads: how many of the CPU. None leaves the number to OpenVINO.
        rounds: let OpenVINO round what it multiplies by integer weights to 8 bits, in groups, which is what it does
            unless it is told not to, and faster.

    Raises:
        ExportError: no model is there, OpenVINO is missing or cannot load it, or the model has no cache of dynamic
            length.
        VerificationError: the files are not those that ``spinpass.json`` beside them lists.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, rounds: bool = True) -> None:
        file = xml_path(path)
        super().__init__(file, _OpenVINOGraph.open(file, threads, rounds=rounds))


@dataclass
class _State:
    """Which tokens were read, int64 (batch, length) with 0 for padding, and the cache by input."""

    mask: Tensor
    cache: dict[str, Tensor]


@dataclass(frozen=True)
class _OpenVINOGraph:
    """The model as a :class:`.decoding.Graph`: ``cache`` has the output that continues each of its inputs."""

    model: CompiledModel
    ids: str
    logits: int
    cache: dict[str, int]
    one_by_one: bool

    @staticmethod
    def open(path: Path, threads: int | None, *, rounds: bool) -> _OpenVINOGraph:
        finish(path)
        if not path.is_file():
            raise ExportError(f"there is no model at {path}")
        model = CompiledModel(path, threads=threads, rounds=rounds)
        shapes = dict(zip(model.inputs, model.shapes, strict=True))
        stored = [name for name, shape in shapes.items() if len(shape) >= 3 or not shape or is_state(name)]
        ids = [name for name in shapes if name not in (*stored, "position_ids", "cache_position", "attention_mask")]
        if len(ids) != 1 or not stored:
            raise ExportError(
                f"{path} takes {', '.join(model.inputs)}: token ids and a cache are expected; export the graph that "
                "decodes, with a cache of dynamic length as inputs and outputs"
            )
        names = list(model.outputs)
        logits = names.index("logits") if "logits" in names else 0
        cache = continuations(stored, names, logits, path)
        return _OpenVINOGraph(model, ids[0], logits, cache, shapes[ids[0]][-1] == 1)

    def start(self, batch: int) -> _State:
        return _State(
            torch.ones(batch, 0, dtype=torch.int64, device="cpu"),
            {name: self._empty(name, batch) for name in self.cache},
        )

    def _empty(self, name: str, batch: int) -> Tensor:
        """The cache without tokens: its first axis, if dynamic, is the batch, and others that are have the length."""
        at = self.model.inputs.index(name)
        dynamic = [batch, *[0] * len(self.model.shapes[at])]
        sizes = [free if size is None else size for size, free in zip(self.model.shapes[at], dynamic, strict=False)]
        return torch.zeros(sizes, dtype=self.model.dtypes[at], device="cpu")

    def step(self, ids: Tensor, state: _State, mask: Tensor | None = None) -> Tensor:
        marks = torch.ones_like(ids) if mask is None else mask
        if self.one_by_one and ids.shape[1] > 1:
            places = range(ids.shape[1])
            return torch.cat([self.step(ids[:, i : i + 1], state, marks[:, i : i + 1]) for i in places], 1)
        start = state.mask.shape[1]
        state.mask = torch.cat([state.mask, marks], 1)
        given = state.cache | {
            self.ids: ids,
            "position_ids": (state.mask.cumsum(1) - 1).clamp(min=0)[:, start:],
            "cache_position": torch.arange(start, state.mask.shape[1], device="cpu"),
            "attention_mask": state.mask,
        }
        fed = [given[name].to(dtype) for name, dtype in zip(self.model.inputs, self.model.dtypes, strict=True)]
        results = self.model.run(fed)
        state.cache = {name: results[output] for name, output in self.cache.items()}
        return results[self.logits]

    def rewind(self, state: _State, length: int) -> bool:
        """Forget all but the first ``length`` tokens; False, and nothing, where a cache does not grow with them."""
        known = state.mask.shape[1]
        axes = {name: self._growing(name) for name in self.cache}
        if any(axis is None or state.cache[name].shape[axis] != known for name, axis in axes.items()):
            return False
        for name, axis in axes.items():
            assert axis is not None
            state.cache[name] = state.cache[name].narrow(axis, 0, length)
        state.mask = state.mask[:, :length]
        return True

    def _growing(self, name: str) -> int | None:
        shape = self.model.shapes[self.model.inputs.index(name)]
        return next((axis for axis, size in enumerate(shape) if axis and size is None), None)

"""A model of transformers whose weights stay in its files: the program is traced without them and reads them later.

transformers loads the model in the dtype that is stored, which maps the files and copies nothing. A second model of the
same configuration, whose weights are memory that nobody has written to, is traced in the dtype that is asked for. Its
constants then become handles of the first one's (:class:`spinpass.graph.Handle`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.graph import Handle, Held, storage_key, with_other_values

from .files import gguf_header

STREAMED_BYTES = 100 << 20
"""Models of so many bytes of weights and more are read as they are needed."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SMALL = 1 << 16  # elements up to which a constant is held in memory


class Streamed:
    """The model that is traced, and where its values are.

    Args:
        traced: the model, its parameters memory that nobody has written to, but for the small ones.
        values: by the memory of parameters and stored buffers, those that are read when they are used.
    """

    def __init__(self, traced: Any, values: Mapping[tuple[Any, ...], Tensor]) -> None:
        self.traced = traced
        self._values = values

    @classmethod
    def of(cls, loaded: Any, dtype: Any, stored: Mapping[str, torch.dtype | str]) -> Streamed | None:
        """Return a model to be traced in a dtype, ``"auto"`` for that of the files.

        Return None where the weights are better loaded: their files, whose dtypes are ``stored``, hold others than the
        model was loaded in, it keeps some of its layers in float32, or what its configuration ties are two tensors.
        """
        asked = loaded.dtype if dtype == "auto" else dtype
        if keeps_floats(loaded, asked):
            return None
        if any(_FLOATS.get(str(kind), loaded.dtype) != loaded.dtype for kind in stored.values()):
            return None
        traced = unwritten(type(loaded), loaded.config, asked)
        traced.generation_config = loaded.generation_config
        return cls.filling(traced, {name: value.detach() for name, value in loaded.state_dict().items()})

    @classmethod
    def filling(cls, traced: Any, stored: Mapping[str, Tensor]) -> Streamed | None:
        """Return a model with the values that are stored, by the names of its parameters and buffers.

        The small ones are copied. Return None where parameters that are one have values of their own, or none.
        """
        first: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        found: dict[tuple[Any, ...], Tensor] = {}
        places = {name: place for name, place in traced.state_dict().items() if place.numel()}
        for name, place in places.items():
            value, key = stored.get(name), storage_key(place)
            if value is None:
                continue
            if first.setdefault(key, storage_key(value)) != storage_key(value):
                return None
            if value.numel() <= _SMALL:
                with torch.no_grad():
                    place.copy_(value)
            elif key not in found:
                found[key] = value if isinstance(value, Handle) else Handle(Held(value, place.dtype))
        return cls(traced, found) if all(storage_key(place) in first for place in places.values()) else None

    def with_values(self, program: ExportedProgram) -> ExportedProgram:
        """Return the traced program with the values of the files."""
        values = {name: self._values.get(storage_key(tensor)) for name, tensor in program.state_dict.items()}
        return with_other_values(program, {name: value for name, value in values.items() if value is not None})

    @contextmanager
    def filled(self) -> Iterator[Any]:
        """Let the traced model compute with the values of the files, for as long as it is asked."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for module in self.traced.modules():
            for held in (module._parameters, module._buffers):  # noqa: SLF001  to register is to forget what is stored
                for name, tensor in held.items():
                    value = None if tensor is None else self._values.get(storage_key(tensor))
                    if value is not None:
                        before.append((held, name, tensor))
                        parameter = isinstance(tensor, nn.Parameter)
                        held[name] = nn.Parameter(value, requires_grad=False) if parameter else value
        try:
            yield self.traced
        finally:
            for held, name, tensor in before:
                held[name] = tensor


def unwritten(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model of transformers as its class makes it of a configuration, its weights memory that nobody has
    written to."""
    initialization = importlib.import_module("transformers.initialization")
    make = getattr(kind, "_from_config", None) or kind.from_config  # of a model, as AutoModel does; of AutoModel
    with initialization.no_init_weights():
        traced = make(config, dtype=dtype).eval()
    traced.tie_weights()
    return traced


def keeps_floats(model: Any, dtype: torch.dtype) -> bool:
    """Say whether a model in a dtype has layers that transformers keeps in float32."""
    kept = any(getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
    return kept and dtype.itemsize < torch.float32.itemsize


def can_stream(weights: Sequence[Path]) -> bool:
    """Return whether a model is better read as it is needed: from large safetensors files, or a GGUF file of as many
    values, which have two bytes and more in memory."""
    if any(path.suffix not in (".safetensors", ".gguf") for path in weights):
        return False
    return sum(_bytes_held(path) for path in weights) >= STREAMED_BYTES


def _bytes_held(path: Path) -> int:
    if path.suffix != ".gguf":
        return path.stat().st_size
    return 2 * sum(math.prod(tensor.shape) for tensor in gguf_header(path).tensors.values())

"""A folder of transformers whose weights stay in its files: the program is traced without them and reads them later.

transformers loads the model in the dtype that is stored, which maps the files and copies nothing. A second model of the
same configuration, whose weights are memory that nobody has written to, is traced in the dtype that is asked for. Its
constants then become handles of the first one's (:class:`spinpass.graph.Handle`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.graph import Handle, Held, storage_key, with_other_values

STREAMED_BYTES = 100 << 20
"""Folders of so many bytes of weights and more are read as they are needed."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SMALL = 1 << 16  # elements up to which a constant is held in memory


class Streamed:
    """The model that is traced, and where its values are.

    Args:
        loaded: the model in the dtype of its files.
        dtype: that of the program.
    """

    def __init__(self, loaded: Any, dtype: torch.dtype) -> None:
        initialization = importlib.import_module("transformers.initialization")
        with initialization.no_init_weights():
            traced = type(loaded)._from_config(loaded.config, dtype=dtype).eval()  # noqa: SLF001  as AutoModel does
        traced.tie_weights()
        traced.generation_config = loaded.generation_config
        self.traced = traced
        self._values = self._handles(loaded)

    @classmethod
    def of(cls, loaded: Any, dtype: Any, stored: Mapping[str, torch.dtype | str]) -> Streamed | None:
        """Return a model to be traced in a dtype, ``"auto"`` for that of the files.

        Return None where the weights are better loaded: their files, whose dtypes are ``stored``, hold others than the
        model was loaded in, it keeps some of its layers in float32, or what its configuration ties are two tensors.
        """
        asked = loaded.dtype if dtype == "auto" else dtype
        kept = any(getattr(loaded, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
        if kept and asked.itemsize < torch.float32.itemsize:
            return None
        if any(_FLOATS.get(str(kind), loaded.dtype) != loaded.dtype for kind in stored.values()):
            return None
        made = cls(loaded, asked)
        return made if made._is_tied_as(loaded) else None

    def _is_tied_as(self, loaded: Any) -> bool:
        """Say whether weights that are one in the traced model are one in the files, too."""
        stored = loaded.state_dict()
        first: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for name, place in self.traced.state_dict().items():
            key = storage_key(stored[name])
            if place.numel() and first.setdefault(storage_key(place), key) != key:
                return False
        return True

    def _handles(self, loaded: Any) -> dict[tuple[Any, ...], Tensor]:
        """Return by the memory that the traced model has for them the values of all parameters and stored buffers."""
        found: dict[tuple[Any, ...], Tensor] = {}
        stored = loaded.state_dict()
        for name, place in self.traced.state_dict().items():
            value = stored[name].detach()
            key = storage_key(place)
            if value.numel() <= _SMALL:
                with torch.no_grad():
                    place.copy_(value)
            elif key not in found:
                found[key] = Handle(Held(value, place.dtype))
        return found

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


def can_stream(weights: Sequence[Path]) -> bool:
    """Return whether a folder is better read as it is needed: of large safetensors files."""
    if any(path.suffix != ".safetensors" for path in weights):
        return False
    return sum(path.stat().st_size for path in weights) >= STREAMED_BYTES

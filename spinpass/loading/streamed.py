"""A folder of transformers whose weights stay in its files: the program is traced without them and reads them later.

transformers loads the model in the dtype that is stored, which maps the files and copies nothing. A second model of the
same configuration, whose weights are memory that nobody has written to, is traced in the dtype that is asked for. Its
constants then become handles of the first one's (:class:`spinpass.graph.Handle`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.graph import Handle, Held, storage_key, with_other_values

STREAMED_BYTES = 100 << 20
"""Folders of so many bytes of weights and more are read as they are needed."""

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
        traced.config.dtype = dtype
        self.traced = traced
        self._values = self._handles(loaded)

    @classmethod
    def of(cls, loaded: Any, dtype: Any) -> Streamed | None:
        """Return a model to be traced in a dtype, ``"auto"`` for that of the files.

        Return None where it would hold some weights in less precision than a load in that dtype has them, as models
        do that keep some of their layers in float32.
        """
        asked = loaded.dtype if dtype == "auto" else dtype
        kept = any(getattr(loaded, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
        return None if kept and asked.itemsize < torch.float32.itemsize else cls(loaded, asked)

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
        before: list[tuple[Any, str, nn.Parameter]] = []
        for module in self.traced.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                value = self._values.get(storage_key(parameter))
                if value is not None:
                    before.append((module, name, parameter))
                    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        try:
            yield self.traced
        finally:
            for module, name, parameter in before:
                module.register_parameter(name, parameter)


def can_stream(weights: Sequence[Path]) -> bool:
    """Return whether a folder is better read as it is needed: of large safetensors files."""
    if any(path.suffix != ".safetensors" for path in weights):
        return False
    return sum(path.stat().st_size for path in weights) >= STREAMED_BYTES

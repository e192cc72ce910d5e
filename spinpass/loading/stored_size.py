"""What a model holds, by the headers of its files: how many values, in matrices of which shapes; no weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinpass.errors import SpinpassError
from spinpass.formats import safetensors_header

from .files import gguf_header, weight_files
from .sources import Source
from .streamed import can_stream

_CODES = {"I32": 32, "U8": 8, "I8": 8}  # bits of the integers that hold codes


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a model's files.

    Attributes:
        shapes: of all tensors that hold values. What lies packed in integers is counted by the bits that config.json
            names, along the last axis, so that the number may be a little off.
        bytes: of the files.
        streams: the weights can stay in their files, as they are of a large folder of safetensors.
        files: where they are.
    """

    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    streams: bool
    files: tuple[Path, ...]

    @property
    def values(self) -> int:
        """How many weights there are."""
        return sum(math.prod(shape) for shape in self.shapes)


def stored_model(source: Source) -> StoredModel | None:
    """Return what a model's files say that they hold; None where no header on this machine says so.

    A file that is no safetensors, or is damaged, gives None: loading says what is wrong with it.
    """
    try:
        if source.kind == "gguf":
            return _of_gguf(Path(source.location, str(source.gguf)))
        folder = Path(source.location)
        if source.kind == "program" or not folder.is_dir():
            return None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        packed = config.get("quantization_config") or {}
        bits = _bits(packed)
        found = weight_files(None, source.location).values()  # of a folder, nothing is asked of transformers
        files = tuple(file for file in found if file.suffix == ".safetensors")
        shapes = [shape for file in files for shape in _of_header(safetensors_header(file), bits)]
        size = sum(file.stat().st_size for file in files)
        return StoredModel(tuple(shapes), size, not packed and can_stream(files), files) if shapes else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SpinpassError):
        return None


def count_values(source: Source) -> int | None:
    """Return how many weights there are, without reading one; None where no header on this machine says so."""
    found = stored_model(source)
    return None if found is None else found.values


def _bits(packed: Mapping[str, Any]) -> int:
    """Return how many bits config.json names for codes, the fewest where groups of weights differ."""
    groups = (packed.get("config_groups") or {}).values()
    named = [int((group.get("weights") or {}).get("num_bits") or 8) for group in groups]
    return int(packed.get("bits") or min(named, default=4 if packed.get("quant_method") == "mxfp4" else 8))


def _of_header(header: Mapping[str, Any], bits: int) -> list[tuple[int, ...]]:
    """Return the shapes of the values of all tensors, k for an integer that holds k codes."""
    found = []
    for entry in header.values():
        held = max(1, _CODES.get(entry["dtype"], 0) // bits)
        *outer, last = entry["shape"] or [1]
        found.append((*outer, last * held))
    return found


def _of_gguf(file: Path) -> StoredModel:
    shapes = tuple(tensor.shape for tensor in gguf_header(file).tensors.values())
    return StoredModel(shapes, file.stat().st_size, False, (file,))

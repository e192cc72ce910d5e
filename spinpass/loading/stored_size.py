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
_TURNED, _BESIDE = ".qweight", (".qzeros", ".scales", ".g_idx")  # GPTQ's: (in, out), and what belongs to the codes


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a model's files.

    Attributes:
        shapes: of all tensors that hold values, of a matrix (out, in). What lies packed in integers is counted by the
            bits that config.json names, along the last axis but for GPTQ's, so that the number may be a little off.
        bytes: of the files.
        streams: the weights can stay in their files, as those of a large folder of safetensors or GGUF file do.
        files: where they are.
        merged: bytes of the matrices of experts, which loading puts together into stacks in memory. Their shapes are
            those of the stacks.
    """

    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    streams: bool
    files: tuple[Path, ...]
    merged: int = 0

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
        headers = [safetensors_header(file) for file in files]
        single, stacks, merged = _without_experts({k: v for each in headers for k, v in each.items()}, config)
        shapes = (*stacks, *_of_header(single, bits))
        size = sum(file.stat().st_size for file in files)
        return StoredModel(shapes, size, not packed and can_stream(files), files, merged) if shapes else None
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
    found: list[tuple[int, ...]] = []
    for name, entry in header.items():
        held = max(1, _CODES.get(entry["dtype"], 0) // bits)
        *outer, last = entry["shape"] or [1]
        stem, _, part = name.rpartition(".")
        if name.endswith(_TURNED) and len(outer) == 1:
            found.append((last, outer[0] * held))
        elif f".{part}" not in _BESIDE or stem + _TURNED not in header:
            found.append((*outer, last * held))
    return found


def _without_experts(
    header: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[int, ...]], int]:
    """Return what is not a matrix of floats of an expert, the shapes of stacks of those that are, and their bytes.

    As many matrices of a layer as the configuration says that there are experts differ in their number alone.
    """
    about = (*config.items(), *(config.get("text_config") or {}).items())
    counts = {number for key, number in about if "expert" in key and isinstance(number, int)}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in header.items():
        parts = name.split(".")
        numbers = [k for k, part in enumerate(parts) if part.isdecimal()]
        if len(numbers) > 1 and len(entry["shape"]) == 2 and entry["dtype"] not in _CODES:
            parts[numbers[-1]] = ""
            groups.setdefault((*parts, *entry["shape"]), []).append(name)
    stacks = [names for names in groups.values() if len(names) > 1 and len(names) in counts]
    merged = {name for names in stacks for name in names}
    size = sum(end - start for start, end in (header[name]["data_offsets"] for name in merged))
    shapes = [(len(names), *header[names[0]]["shape"]) for names in stacks]
    return {name: entry for name, entry in header.items() if name not in merged}, shapes, size


def _of_gguf(file: Path) -> StoredModel:
    shapes = tuple(tensor.shape for tensor in gguf_header(file).tensors.values())
    return StoredModel(shapes, file.stat().st_size, can_stream([file]), (file,))

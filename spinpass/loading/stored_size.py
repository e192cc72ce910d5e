"""How many values a model holds, by the headers of its files: what a file that is made of it needs on the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spinpass.errors import SpinpassError
from spinpass.formats import safetensors_header

from .files import gguf_header, weight_files
from .sources import Source

_CODES = {"I32": 32, "U8": 8, "I8": 8}  # bits of the integers that hold codes


def count_values(source: Source) -> int | None:
    """Return how many weights there are, without reading one; None where no header on this machine says so.

    What lies packed in integers is counted by the bits that config.json names, so that the number may be a little off.
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
        bits = int(packed.get("bits") or (4 if packed.get("quant_method") == "mxfp4" else 8))
        files = weight_files(None, source.location).values()  # of a folder, nothing is asked of transformers
        headers = [safetensors_header(file) for file in files if file.suffix == ".safetensors"]
        return sum(_of_header(header, bits) for header in headers) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SpinpassError):
        return None


def _of_header(header: Mapping[str, Any], bits: int) -> int:
    """Σ over tensors of their values, k for an integer that holds k codes"""
    return sum(math.prod(entry["shape"]) * max(1, _CODES.get(entry["dtype"], 0) // bits) for entry in header.values())


def _of_gguf(file: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in gguf_header(file).tensors.values())

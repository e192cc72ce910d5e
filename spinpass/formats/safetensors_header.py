"""What a ``.safetensors`` file says of itself, checked against its length; no tensor is read.

    8 bytes: length n of the header | n bytes of JSON: name -> dtype, shape, first and last byte | the tensors

The format has no checksum. What there is: the tensors fill the rest of the file, one after the other, without a gap,
and each has the size of its shape and dtype.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from spinpass.errors import DamageError

from .documents import parsed

_LONGEST = 100_000_000  # as safetensors itself allows
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def check_safetensors(path: Path) -> dict[str, str]:
    """Return the dtype of every tensor of a file by name, as the file spells it. Raises DamageError as
    :func:`safetensors_header`."""
    return {name: entry["dtype"] for name, entry in safetensors_header(path).items()}


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return the entry of every tensor of a file by name: ``dtype``, ``shape``, ``data_offsets``.

    Raises DamageError: the header is no JSON, has a name twice, or does not describe the rest of the file exactly.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST):
                raise DamageError(
                    f"{path} is damaged: its header of {length:,} bytes does not fit into it; copy it again"
                )
            header = parsed(file.read(length), f"the header of {path}")
    except OSError as error:
        raise DamageError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise DamageError(f"{path} is damaged: its header is no table of tensors; copy it again")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise DamageError(f"{path} is damaged: its metadata are no strings; copy it again")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    at = 0
    for first, last, name in spans:
        if first != at:
            raise DamageError(
                f"{path} is damaged: {name} begins at byte {first} of the tensors, not at {at}; copy it again"
            )
        at = last
    if at != size - 8 - length:
        raise DamageError(
            f"{path} is damaged: its tensors have {at:,} bytes, the file has {size - 8 - length:,}; copy it again"
        )
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)], **more} if not more:
            fits = all(isinstance(n, int) and n >= 0 for n in shape) and first >= 0
            if fits and dtype in _BITS and (last - first) * 8 == math.prod(shape) * _BITS[dtype]:
                return first, last, name
    raise DamageError(f"{path} is damaged: its entry of {ascii(name)[1:81]} has no size that fits; copy it again")

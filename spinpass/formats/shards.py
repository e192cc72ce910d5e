"""Tensors written as safetensors files, each read when its bytes are due:  8 bytes | header | tensor after tensor.

Files and index are named as transformers names them, so that ``from_pretrained`` reads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.graph import Handle

from .staging import staged

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
_ALONE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
"""Of tensors in a file, as transformers has it."""

_ALIGNED = 8  # the header ends at a multiple of so many bytes


def write_shards(
    folder: str | Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES
) -> tuple[Path, ...]:
    """Write ``model.safetensors``, or several of them and an index where they have more bytes than one takes.

    Args:
        folder: where they are written; files of such names are replaced, or deleted where they are not written again.
        tensors: by name; a :class:`spinpass.graph.Handle` is read a block of rows at a time.
        shard_bytes: how many bytes of tensors a file holds at most, but for a single tensor that has more.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: the format has no such dtype.
        ExportError: the folder is not writable, or the disk is full. Nothing is left behind.
    """
    folder = Path(folder)
    check_storable(tensors)
    with staged(folder, sum(t.nbytes for t in tensors.values()), gone=shards_in(folder)) as staging:
        put_shards(staging, tensors, shard_bytes=shard_bytes)
        written = sorted(path.name for path in staging.iterdir())
    return tuple(folder / name for name in written)


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where the format has no such dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ConfigError(f"{name}: safetensors files are written of {', '.join(_NAMES.values())} here")


def shards_in(folder: Path) -> list[str]:
    """Return the names of the files of weights in a folder, which others take the place of."""
    return [path.name for path in folder.glob("model*.safetensors*")] if folder.is_dir() else []


def put_shards(staging: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the files of :func:`write_shards` into a folder that is moved in place by the caller."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    total, count = sum(t.nbytes for t in tensors.values()), len(shards)
    names = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)] if count > 1 else [_ALONE]
    for file, shard in zip(names, shards, strict=True):
        _write(staging / file, shard)
    if count > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (staging / f"{_ALONE}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        span = [at, at + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            held = tensor.detach()
            for block in held.blocks() if isinstance(held, Handle) else (held,):
                file.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

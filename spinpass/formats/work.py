"""What a run has rounded, kept until its folder is there:  OUT is killed  ->  the same command goes on from it.

    in the run's hidden folder:  what it is of (run.json);  of each weight its codes (N.codes), what they are (N.json)

A weight's codes are there when its JSON is, which comes last and has their hash. They are read from the file by whoever
needs them, so that memory holds none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.quantization import Codes, QuantizedWeight, Weights

from .staging import refusals

_RUN = "run.json"
_ALIGNED = 64  # bytes, which every tensor begins at a multiple of
_TENSORS = ("q", "scales", "zeros", "index")
_DTYPES = {str(dtype): dtype for dtype in (torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class KeptWork:
    """The weights that were rounded, in a folder.

    Args:
        folder: it is there.
        kind: of what they are, where a run rounds several programs.
    """

    folder: Path
    kind: str = ""

    @classmethod
    def of(cls, folder: Path, run: Mapping[str, str]) -> KeptWork:
        """Open the work of a run, or begin it.

        Args:
            folder: where it is, or will be.
            run: all that the codes depend on: what it is, by what it is called.

        Raises ConfigError: another run has left its work there.
        """
        if folder.exists() and not folder.is_dir():
            folder.unlink()
        folder.mkdir(exist_ok=True)
        file = folder / _RUN
        before = _read_run(file)
        if before is not None:
            differing = sorted(name for name in {*before, *run} if before.get(name) != run.get(name))
            if differing:
                raise ConfigError(
                    f"{folder} holds the work of a run that was stopped, of another {', another '.join(differing)}: "
                    "run that again to finish it, or delete the folder to begin anew"
                )
        else:
            for entry in folder.iterdir():  # of nobody knows what
                entry.unlink()
            _write(file, json.dumps(run).encode())
        return cls(folder)

    def of_kind(self, kind: str) -> KeptWork:
        """Return the work on another program of the run."""
        return replace(self, kind=kind)

    @property
    def learning(self) -> Path:
        """The file for what is being learned."""
        return self.folder / f"{self.kind or 'program'}.learning.pt"

    @property
    def count(self) -> int:
        """How many weights there are, of all kinds."""
        return sum(1 for file in self.folder.glob("*.json") if file.name != _RUN)

    @property
    def bytes(self) -> int:
        """How many bytes their codes have on the disk; 0 where there is no such folder."""
        return sum(file.stat().st_size for file in self.folder.glob("*.codes"))

    def get(self, name: str, scheme: Weights) -> QuantizedWeight | None:
        """Return what a weight was rounded to by a scheme, None where it was not, or its file is damaged."""
        about_file, file = self._files(name)
        try:
            stored = json.loads(about_file.read_text(encoding="utf-8"))
            about = stored["about"]
            if stored["sha256"] != _digest(about) or about["scheme"] != repr(scheme):
                return None
            held = _held(file, about)
            if about["sha256"] != hashlib.sha256(held.numpy().data).hexdigest():
                return None
            return _weight(held, about, scheme)
        except (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError):
            return None

    def put(self, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        """Keep a weight, and return it as it is read from its file. Raises ExportError where the disk takes no more."""
        with refusals(self.folder):
            about = self._put(name, weight)
            return _weight(_held(self._files(name)[1], about), about, weight.scheme)

    def _put(self, name: str, weight: QuantizedWeight) -> dict[str, Any]:
        """Write the files of a weight, and return what the codes are."""
        about_file, file = self._files(name)
        codes, tensors, size = weight.codes, dict[str, Any](), 0
        digest = hashlib.sha256()
        staging = file.with_suffix(".new")
        with staging.open("wb") as out:
            for part in _TENSORS:
                tensor = getattr(codes, part)
                if tensor is None:
                    continue
                data = tensor.detach().cpu().contiguous()
                tensors[part] = {"at": size, "shape": list(data.shape), "dtype": str(data.dtype)}
                content = memoryview(data.view(-1).view(torch.uint8).numpy()) if data.numel() else memoryview(b"")
                for each in (content, bytes(-len(content) % _ALIGNED)):
                    out.write(each)
                    digest.update(each)
                    size += len(each)
        os.replace(staging, file)
        about: dict[str, Any] = {
            "name": name, "scheme": repr(weight.scheme), "dim": weight.dim, "error": weight.error.hex(),
            "stack": weight.stack, "tokens": list(weight.tokens), "bits": codes.bits, "symmetric": codes.symmetric,
            "group_bits": codes.group_bits, "tensors": tensors, "bytes": size, "sha256": digest.hexdigest(),
        }  # fmt: skip
        _write(about_file, json.dumps({"about": about, "sha256": _digest(about)}).encode())
        return about

    def _files(self, name: str) -> tuple[Path, Path]:
        stem = hashlib.sha256(f"{self.kind}\0{name}".encode()).hexdigest()[:32]
        return self.folder / f"{stem}.json", self.folder / f"{stem}.codes"


def _read_run(file: Path) -> dict[str, str] | None:
    """Return what the work in a folder is of; None where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found else None


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _held(file: Path, about: Mapping[str, Any]) -> Tensor:
    """Return the bytes of a file, which are read when they are used."""
    return torch.from_file(str(file), shared=False, size=about["bytes"], dtype=torch.uint8)


def _weight(held: Tensor, about: Mapping[str, Any], scheme: Weights) -> QuantizedWeight:
    tensors = {part: _cut(held, entry) for part, entry in about["tensors"].items()}
    widths = about["group_bits"]
    codes = Codes(
        tensors["q"],
        tensors["scales"],
        tensors["zeros"],
        about["bits"],
        about["symmetric"],
        tensors.get("index"),
        None if widths is None else tuple(widths),
    )
    return QuantizedWeight(
        codes, about["dim"], scheme, float.fromhex(about["error"]), about["stack"], tuple(about["tokens"])
    )


def _cut(held: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype, count = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
    if not count:
        return torch.empty(entry["shape"], dtype=dtype, device="cpu")
    return held[entry["at"] : entry["at"] + count * dtype.itemsize].view(dtype).view(entry["shape"])


def _write(file: Path, content: bytes) -> None:
    staging = file.with_suffix(".tmp")
    staging.write_bytes(content)
    os.replace(staging, file)

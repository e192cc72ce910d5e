"""Copies of ONNX models whose nodes were replaced: read, loaded once by ONNX Runtime, stored whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from spinpass.errors import ExportError
from spinpass.formats import EXTERNAL_BYTES, data_name, model_path, remove_stale_data, staged
from spinpass.runtime import open_session

from ..fusion.builder import CONTRIB
from .rewrite import Work


@dataclass(frozen=True)
class QuantizeReport:
    """This is what :func:`quantize_4bit` or :func:`pack_weights` did.

    ``matmuls`` counts the products on integers without the heads, ``heads`` and ``tables`` those, ``shared`` the tables
    that are read from a head's constant; ``kept`` says of every other float matrix product and table with a constant
    why it stayed.
    """

    path: Path
    files: tuple[Path, ...]
    bytes_before: int
    bytes_after: int
    matmuls: int
    heads: int
    tables: int
    shared: int
    kept: tuple[str, ...]

    @classmethod
    def of(cls, work: Work, path: Path, files: tuple[Path, ...], *, before: int, after: int) -> QuantizeReport:
        """Return what became of a model that ``work`` has changed and that was written since."""
        counts = (work.matmuls, work.heads, work.tables, work.shared, tuple(work.kept))
        return cls(path, files, before, after, *counts)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return self.__dict__ | {"path": str(self.path), "files": [str(f) for f in self.files], "kept": list(self.kept)}


def write_quantized(
    model: ir.Model, work: Work, source: str | Path, target: Path, external_data: bool | None
) -> QuantizeReport:
    """Store a model whose nodes ``work`` has replaced.

    Raises ExportError where nothing was replaced, or where :func:`write_copy` does.
    """
    origin = model_path(source)
    check_replaced(model, work, str(origin))
    before = _size(origin, model)
    files, after = write_copy(model, source, target, external_data)
    return QuantizeReport.of(work, target, files, before=before, after=after)


def check_replaced(model: ir.Model, work: Work, where: str) -> None:
    """Drop what the replaced nodes alone read, in place. Raises ExportError where nothing was replaced."""
    if not (work.matmuls or work.heads or work.tables):
        reasons = "; ".join(work.kept) or "it multiplies by no constant matrix"
        raise ExportError(f"there is nothing to quantize in {where}: {reasons}")
    model.opset_imports[CONTRIB] = 1
    common.RemoveUnusedNodesPass()(model)


def write_copy(
    model: ir.Model, source: str | Path, target: Path, external_data: bool | None
) -> tuple[tuple[Path, ...], int]:
    """Store a changed model of ``source`` at ``target``, with the other files of its folder.

    Returns the paths of all files, and the bytes of the model itself.

    Raises ExportError: ONNX Runtime cannot load it, or nothing can be written there. Nothing is left behind.
    """
    origin = model_path(source)
    weights = weight_bytes(model)
    external = weights > EXTERNAL_BYTES if external_data is None else external_data
    if not external:  # else the tensors that stayed would go on naming the source's data file
        ir.external_data.load_to_model(model)
    with staged(target.parent, weights) as staging:
        ir.save(model, staging / target.name, external_data=data_name(target) if external else None)
        open_session(staging / target.name)
        size = sum(file.stat().st_size for file in staging.iterdir())
        for file in _companions(source, origin) if origin.parent.resolve() != target.parent.resolve() else ():
            shutil.copyfile(file, staging / file.name)
        files = tuple(target.parent / file.name for file in sorted(staging.iterdir()))
    remove_stale_data(target, files)
    return files, size


def weight_bytes(model: ir.Model) -> int:
    """Return how many bytes the initializers of a model have."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def load(path: Path) -> ir.Model:
    """Load a model whose weights stay on disk. Raises ExportError where there is none, or it cannot be read."""
    if not path.is_file():
        raise ExportError(f"there is no ONNX model at {path}")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's DecodeError and whatever a damaged file leads to
        raise ExportError(f"{path} is not a readable ONNX model: {error}") from error


def _size(path: Path, model: ir.Model) -> int:
    """Add up the bytes of the model file and of the data files it names."""
    values = (value.const_value for value in model.graph.initializers.values())
    data = {Path(path.parent, t.location) for t in values if isinstance(t, ir.ExternalTensor)} | {
        path.with_name(data_name(path))
    }
    return path.stat().st_size + sum(file.stat().st_size for file in data if file.is_file())


def _companions(source: str | Path, origin: Path) -> Iterator[Path]:
    """Yield the files beside the model that belong to it, if ``source`` is a folder."""
    if Path(source).is_dir():
        yield from (f for f in origin.parent.iterdir() if f.is_file() and not f.name.endswith((".onnx", ".onnx.data")))

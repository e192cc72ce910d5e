"""Where the files of a model are, for each runtime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

PROTOBUF_LIMIT = 2**31 - 2**26
"""Bytes of weights a single file holds: protobuf ends at 2 GiB, and the graph itself needs room too."""

EXTERNAL_BYTES = 100 << 20
"""Bytes of weights from which on they lie beside the file: a protobuf stands several times in memory when it is read or
written."""

_RUNTIMES = (".onnx", ".xml", ".pte")


def model_path(path: str | Path) -> Path:
    """Return ``path`` if it names an ``.onnx`` file, else ``model.onnx`` in that folder."""
    path = Path(path)
    return path if path.suffix == ".onnx" else path / "model.onnx"


def data_name(model: Path) -> str:
    """Return the name of the file for external data, in the same folder."""
    return f"{model.name}.data"


def remove_stale_data(model: Path, written: Collection[Path]) -> None:
    """Delete the external data of an older model of that name which the new one no longer refers to."""
    data = model.with_name(data_name(model))
    if data not in written:
        data.unlink(missing_ok=True)


def pte_path(path: str | Path) -> Path:
    """Return ``path`` if it names a ``.pte`` file, else ``model.pte`` in that folder."""
    path = Path(path)
    return path if path.suffix == ".pte" else path / "model.pte"


def xml_path(path: str | Path) -> Path:
    """Return ``path`` if it names an ``.xml`` file, else ``openvino_model.xml`` in that folder, the name that optimum
    has for it."""
    path = Path(path)
    return path if path.suffix == ".xml" else path / "openvino_model.xml"


def runtime_file(path: str | Path) -> Path | None:
    """Return the file that a runtime runs: ``path`` itself if its name ends so, else that of ONNX Runtime, OpenVINO or
    ExecuTorch in that folder, the first that is there; None where none is."""
    path = Path(path)
    if path.suffix in _RUNTIMES:
        return path
    files = (model_path(path), xml_path(path), pte_path(path))
    return next((file for file in files if file.is_file()), None)

"""OpenVINO models on a CPU, in the precision they were written in, with errors that say what failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import ExportError


def import_openvino() -> Any:
    """The package. Raises ExportError where it is not installed."""
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ExportError(f"this needs the package {error.name}: pip install 'spinpass[openvino]'") from error
    return openvino


class CompiledModel:
    """A model file compiled for the CPU at float32: OpenVINO's own choice may be less precise.

    Raises:
        ExportError: OpenVINO is missing or cannot load the file.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        openvino = import_openvino()
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # OpenVINO raises RuntimeError and its subclasses, and TypeError for options
            raise ExportError(
                f"OpenVINO {openvino.__version__} cannot load {Path(path).name}: {reason(error)}"
            ) from error
        self._request = self._model.create_infer_request()
        self.inputs = tuple(port.get_any_name() for port in self._model.inputs)
        self.outputs = tuple(port.get_any_name() for port in self._model.outputs)
        self.ranks = tuple(port.get_partial_shape().rank.get_length() for port in self._model.inputs)

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """All outputs for one value per input, in order. Raises ExportError where OpenVINO fails."""
        feed = {i: value.detach().cpu().contiguous().numpy() for i, value in enumerate(values)}
        try:
            results = self._request.infer(feed, share_inputs=False, share_outputs=False)
        except Exception as error:  # see __init__
            raise ExportError(f"OpenVINO cannot run the model: {reason(error)}") from error
        return [torch.from_numpy(results[port]) for port in self._model.outputs]


def reason(error: BaseException) -> str:
    """What OpenVINO says at the end of its long messages: the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]

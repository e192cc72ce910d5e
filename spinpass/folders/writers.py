"""What writes the folder that is asked for, and what the other ranks of a team do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from spinpass.loading import LoadedModel
from spinpass.workers import Team

from .companions import Written
from .executorch import executorch_tools, write_pte_folder
from .gptq import write_gptq_folder
from .onnx import assist_folder, onnx_tools, write_folder
from .openvino import openvino_tools, write_openvino_folder
from .request import ExportRequest

_Writer = Callable[..., Written]


def writer_of(request: ExportRequest, team: Team) -> _Writer:
    """Return what this rank does for the folder, with its packages imported; rank 0 writes it.

    Raises ExportError where a package is missing.
    """
    trained = request.scheme is not None and request.scheme.learn is not None
    if request.to == "onnx" and not trained:
        if team.leads:
            return partial(_onnx(request), team=team)
        return partial(assist_folder, onnx_tools(), team, int4=request.int4, fuse=request.fuse)
    return _alone(request) if team.leads else _wait


def _alone(request: ExportRequest) -> _Writer:
    """Return what writes a folder in one process: what was learned, for one, is rank 0's alone."""
    if request.to == "gptq":
        return write_gptq_folder
    if request.to == "executorch":
        return partial(write_pte_folder, executorch_tools())
    if request.to == "openvino":
        return partial(write_openvino_folder, openvino_tools())
    return _onnx(request)


def _onnx(request: ExportRequest) -> _Writer:
    return partial(write_folder, onnx_tools(), int4=request.int4, fuse=request.fuse, memory=request.memory_bytes)


def _wait(loaded: LoadedModel, *_: object, **__: object) -> Written:
    """Do nothing for a folder that one process writes."""
    return Written(None, {}, [], loading=loaded.report)

"""ONNX Runtime behind torch tensors, every float type included, with errors that say what failed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spinpass.errors import ConfigError, DamageError, ExportError, first_line
from spinpass.formats import check_opened

if TYPE_CHECKING:  # what needs no ONNX Runtime can be imported without it
    import onnxruntime as ort

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which numpy has no type for

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
"""The dtypes of a graph's inputs, by ONNX Runtime's names for them."""


class NoKernelError(ExportError):
    """The file is valid, but this build of ONNX Runtime has no kernel for an op in the type it comes in."""


def open_session(
    path: Path,
    provider: str = "CPUExecutionProvider",
    threads: int | None = None,
    *,
    model: bytes | None = None,
    prepack: bool = True,
) -> ort.InferenceSession:
    """A session with the default optimisations that prints nothing by itself.

    Args:
        path: of the file.
        provider: ONNX Runtime's name of what computes.
        threads: how many of the CPU. None leaves the number to ONNX Runtime.
        model: what is run in place of the file, a model that was made of it and reads its data.
        prepack: keep a copy of the weights in the order in which kernels read them. Without one a large model's weights
            stay in their file, and are slower to multiply by.

    Raises:
        ConfigError: this build of ONNX Runtime does not have ``provider``.
        NoKernelError: an op of the graph cannot run there in its type, which is mostly bfloat16 on a CPU.
        ExportError: it cannot load the file; DamageError where that is damaged, or its weights lie elsewhere.
        VerificationError: the file, or its weights, are not those that ``spinpass.json`` beside it lists.
    """
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as MissingKernel

    available = ort.get_available_providers()
    if provider not in available:
        raise ConfigError(f"ONNX Runtime has no provider {provider!r} here; choose one of {', '.join(available)}")
    check_opened(path)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors are raised too; printed, they hold names of the file as they are
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if model is not None:
        options.add_session_config_entry(_DATA_FOLDER, str(path.parent.resolve()))
    try:
        return ort.InferenceSession(str(path) if model is None else model, options, providers=[provider])
    except MissingKernel as error:
        raise NoKernelError(f"ONNX Runtime {ort.__version__} lacks a kernel on {provider}: {error}") from error
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        damaged = isinstance(error, InvalidProtobuf) or "xternal data" in str(error) or "file_length" in str(error)
        kind = DamageError if damaged else ExportError
        raise kind(
            f"ONNX Runtime {ort.__version__} cannot load {path.name} ({first_line(error)}): export it again"
        ) from error


def run_session(session: ort.InferenceSession, inputs: Mapping[str, ort.OrtValue]) -> list[ort.OrtValue]:
    """All outputs of the graph. Raises ExportError where ONNX Runtime fails."""
    try:
        return list(session.run_with_ort_values(None, dict(inputs)))
    except Exception as error:  # see open_session
        raise ExportError(f"ONNX Runtime {_version()} cannot run the model: {error}") from error


def run_in_place(
    session: ort.InferenceSession, inputs: Mapping[str, ort.OrtValue], written: Mapping[str, ort.OrtValue], wanted: str
) -> ort.OrtValue:
    """Run with outputs that are written into values of the caller, which may be inputs too.

    Args:
        session: of the graph.
        inputs: by name.
        written: by name all outputs but one.
        wanted: the name of that one.

    Returns:
        The output ``wanted``.

    Raises:
        ExportError: ONNX Runtime fails.
    """
    try:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in written.items():
            binding.bind_ortvalue_output(name, value)
        binding.bind_output(wanted)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1]
    except Exception as error:  # see open_session
        raise ExportError(f"ONNX Runtime {_version()} cannot run the model: {error}") from error


def _version() -> str:
    import onnxruntime as ort

    return str(ort.__version__)


def to_ort(value: Tensor) -> ort.OrtValue:
    """The value on the CPU in its dtype. It shares no memory with a tensor that may change."""
    import onnxruntime as ort

    plain = value.detach().cpu().contiguous()
    if plain.dtype is torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain.view(torch.uint16).numpy(), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(plain.numpy())


def from_ort(value: ort.OrtValue) -> Tensor:
    """The value as a tensor on the CPU in its dtype."""
    if value.element_type() != _BFLOAT16:
        return torch.from_numpy(value.numpy())
    raw = bytearray(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()))
    shape = value.shape()
    return (
        torch.frombuffer(raw, dtype=torch.bfloat16).view(shape)
        if raw
        else torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    )

"""An exported model, loaded in the runtime that it is for:  .onnx, .xml, .pte  ->  a decoder."""

from __future__ import annotations

from pathlib import Path

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import model_path, runtime_file

from .decoder import Decoder, OrtDecoder
from .onnx_graph import CPU
from .openvino_decoder import OpenVINODecoder


def open_decoder(path: str | Path, *, provider: str = CPU, threads: int | None = None) -> Decoder:
    """Load the model of a folder, or a file.

    Args:
        path: an ``.onnx``, ``.xml`` or ``.pte`` file, or a folder that ``spinpass export`` wrote.
        provider: ONNX Runtime's name of what computes.
        threads: how many of the CPU. None leaves the number to the runtime.

    Raises:
        ConfigError: a provider is named for another runtime than ONNX Runtime, or threads for ExecuTorch, which takes
            all cores.
        ExportError: no model is there, its runtime is missing or cannot load it, or it is not that of a decoder.
        VerificationError: it is not what ``spinpass.json`` beside it lists.
    """
    file = runtime_file(path) or model_path(path)
    if file.suffix != ".onnx" and provider != CPU:
        raise ConfigError(f"--provider {provider} is ONNX Runtime's, and {file.name} is for another: leave it out")
    if file.suffix == ".xml":
        return OpenVINODecoder(file, threads=threads)
    try:
        if file.suffix == ".onnx":
            return OrtDecoder(file, provider=provider, threads=threads)
        from .pte_decoder import PteDecoder
    except ModuleNotFoundError as error:
        extra = "onnx" if file.suffix == ".onnx" else "executorch"
        raise ExportError(f"running {file.name} needs {error.name}: pip install 'spinpass[{extra}]'") from error
    if threads is not None:
        raise ConfigError(f"--threads {threads}: {file.name} is for ExecuTorch, which takes all cores: leave it out")
    return PteDecoder(file)

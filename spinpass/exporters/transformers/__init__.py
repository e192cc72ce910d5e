"""The exporters of transformers with a rotation between ``torch.export`` and the conversion.

    from spinpass.exporters.transformers import RotatedOnnxExporter
    exporter = RotatedOnnxExporter(rotation=spinpass.RotationConfig())
    exported = exporter.export_for_generation(model, inputs, OnnxConfig(dynamic=True))

Nothing is imported before a class is asked for: transformers, and the package of a backend, only where it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spinpass.errors import ExportError

if TYPE_CHECKING:
    from .dynamo import RotatedDynamoExporter
    from .executorch import RotatedExecutorchExporter
    from .four_bits import MatMulNBitsQuantizer
    from .generation import generate_exported
    from .mixin import RotationMixin
    from .onnx import RotatedOnnxExporter
    from .openvino import RotatedOpenVINOExporter

__all__ = [
    "MatMulNBitsQuantizer",
    "RotatedDynamoExporter",
    "RotatedExecutorchExporter",
    "RotatedOnnxExporter",
    "RotatedOpenVINOExporter",
    "RotationMixin",
    "generate_exported",
    "register",
]

_HOMES = {
    "RotationMixin": "mixin",
    "RotatedDynamoExporter": "dynamo",
    "RotatedOnnxExporter": "onnx",
    "RotatedExecutorchExporter": "executorch",
    "RotatedOpenVINOExporter": "openvino",
    "MatMulNBitsQuantizer": "four_bits",
    "generate_exported": "generation",
}
_FORMATS = {
    "dynamo": "RotatedDynamoExporter",
    "onnx": "RotatedOnnxExporter",
    "executorch": "RotatedExecutorchExporter",
    "openvino": "RotatedOpenVINOExporter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{name} needs transformers 5 with its exporters ({error}): pip install 'spinpass[transformers]'"
        ) from error


def register(*formats: str) -> None:
    """Let ``AutoHfExporter.from_config(config, rotation=...)`` make rotated exporters.

    They take the place of transformers' own, under the same names: quantizers check the format's name, and what is
    written is an ordinary file of that format, which loads where there is no spinpass. Runners stay what they are.

    Args:
        formats: some of ``dynamo``, ``onnx``, ``executorch``, ``openvino``; none names all of them.

    Raises:
        ExportError: a format is unknown, or transformers is missing.
    """
    unknown = [name for name in formats if name not in _FORMATS]
    if unknown:
        raise ExportError(f"there is no export format {unknown[0]!r}; there are {', '.join(_FORMATS)}")
    chosen = {name: __getattr__(_FORMATS[name]) for name in formats or _FORMATS}
    auto: Any = import_module("transformers.exporters.auto")
    for name, exporter in chosen.items():
        auto.register_backend(exporter, auto.get_runner_class(name))

"""A whole model folder, written: the model, its tokenizer and configuration, ``spinpass.json``."""

from .companions import Result, check_writable, quantized, rotated, version_of
from .export import ExportRequest, IntegerCache, Target
from .onnx import onnx_tools, write_folder

__all__ = [
    "ExportRequest",
    "IntegerCache",
    "Result",
    "Target",
    "check_writable",
    "onnx_tools",
    "quantized",
    "rotated",
    "version_of",
    "write_folder",
]

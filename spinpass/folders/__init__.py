"""A whole model folder, written: the model, its tokenizer and configuration, ``spinpass.json``."""

from .companions import check_writable
from .onnx import onnx_tools, write_folder
from .request import ExportRequest, IntegerCache, Target
from .result import Result, quantized, rotated, version_of

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

"""A whole model folder, written: the model, its tokenizer and configuration, ``spinpass.json``; :func:`export` does it
all.
"""

from .companions import Written, check_target, check_writable
from .onnx import onnx_tools, write_folder
from .preflight import Known, check_space
from .request import ExportRequest, IntegerCache, Target, export
from .result import Result, quantized, rotated, version_of

__all__ = [
    "ExportRequest",
    "IntegerCache",
    "Known",
    "Result",
    "Target",
    "Written",
    "check_space",
    "check_target",
    "check_writable",
    "export",
    "onnx_tools",
    "quantized",
    "rotated",
    "version_of",
    "write_folder",
]

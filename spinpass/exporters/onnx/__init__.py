"""An exported program becomes an ONNX file that stock ONNX Runtime runs; needs the extra ``onnx``."""

from .compare import compare_file
from .genai import save_genai_config
from .integers.cache import CacheReport, check_cache, quantize_cache
from .integers.copies import QuantizeReport
from .integers.four_bits import quantize_4bit
from .integers.read_back import StoredConstants, check_packed, dequantized_constants
from .integers.unrounded import KernelRounding, kernel_rounding, unrounded_copy
from .integers.weights import pack_weights
from .precision import check_dtypes, check_kernels
from .translate import check_operators
from .writer import OnnxReport, assist, export

__all__ = [
    "CacheReport",
    "KernelRounding",
    "OnnxReport",
    "QuantizeReport",
    "StoredConstants",
    "assist",
    "check_cache",
    "check_dtypes",
    "check_kernels",
    "check_operators",
    "check_packed",
    "compare_file",
    "dequantized_constants",
    "export",
    "kernel_rounding",
    "pack_weights",
    "quantize_4bit",
    "quantize_cache",
    "save_genai_config",
    "unrounded_copy",
]

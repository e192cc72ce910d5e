"""Quantization of exported programs: weights, activations and KV caches, as constants and nodes of the graph."""

from .config import Activations, Cache, QuantizationConfig, Weights
from .double_program import decode_scales, double_quantize_program
from .packed_program import Packed, pack, unpack
from .quantize import quantize
from .report import QuantizationReport, Quantized
from .training import Trainable

__all__ = [
    "Activations",
    "Cache",
    "Packed",
    "QuantizationConfig",
    "QuantizationReport",
    "Quantized",
    "Trainable",
    "Weights",
    "decode_scales",
    "double_quantize_program",
    "pack",
    "quantize",
    "unpack",
]

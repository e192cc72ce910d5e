"""Quantization of exported programs: weights, activations and KV caches, as constants and nodes of the graph."""

from spinpass.quantization.packed.double_scales import decode_scales, double_quantize_program
from spinpass.quantization.packed.program import Packed, pack, unpack
from spinpass.quantization.packed.training import Trainable
from spinpass.quantization.quantize import quantize
from spinpass.quantization.report import QuantizationReport, Quantized
from spinpass.quantization.scheme import Activations, Cache, QuantizationConfig, Weights

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

"""Quantization of exported programs: weights, activations and KV caches, as constants and nodes of the graph."""

from .config import Activations, Cache, QuantizationConfig, Weights
from .quantize import QuantizationReport, Quantized, quantize

__all__ = [
    "Activations",
    "Cache",
    "QuantizationConfig",
    "QuantizationReport",
    "Quantized",
    "Weights",
    "quantize",
]

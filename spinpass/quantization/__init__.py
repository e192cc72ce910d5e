"""Quantization of exported programs: weights, activations and KV caches, as constants and nodes of the graph."""

from .calibration.site_error import site_errors
from .layers.sites import WeightSite, cache_sites, weight_sites
from .packed.distill import distilled
from .packed.double_scales import decode_scales, double_quantize_program
from .packed.program import Packed, pack, rewritten, unpack, weight_name
from .packed.training import Trainable
from .quantizer import quantize
from .report import QuantizationReport, Quantized, QuantizedWeight
from .rounding.grid import Codes
from .scheme import GROUP_SIZES, WEIGHT_BITS, Activations, Cache, QuantizationConfig, Weights

__all__ = [
    "GROUP_SIZES",
    "WEIGHT_BITS",
    "Activations",
    "Cache",
    "Codes",
    "Packed",
    "QuantizationConfig",
    "QuantizationReport",
    "Quantized",
    "QuantizedWeight",
    "Trainable",
    "WeightSite",
    "Weights",
    "cache_sites",
    "decode_scales",
    "distilled",
    "double_quantize_program",
    "pack",
    "quantize",
    "rewritten",
    "site_errors",
    "unpack",
    "weight_name",
    "weight_sites",
]

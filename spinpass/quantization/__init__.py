"""Quantization of exported programs: weights, activations and KV caches, as constants and nodes of the graph."""

from .calibration import site_errors
from .kinds import LEARNABLE, Learnable, check_kinds, kinds_of_bases
from .layers import WeightSite, cache_sites, unrounded_operands, weight_sites
from .learned import (
    Basis,
    balanced_bases,
    balancing_begins,
    begun_basis,
    channel_scales,
    learned,
    learned_bases,
    needs_of_bases,
    roles_of_bases,
    takes_scales,
)
from .packed import (
    Packed,
    Trainable,
    decode_scales,
    double_quantize_program,
    pack,
    rewritten,
    unpack,
    weight_name,
)
from .quantizer import check_shares, quantize
from .report import CodesStore, QuantizationReport, Quantized, QuantizedWeight, matrices_of
from .rounding import Codes
from .scheme import FINE, GROUP_SIZES, WEIGHT_BITS, Activations, Cache, QuantizationConfig, Weights
from .spelling import ALIASES, PARTS

__all__ = [
    "ALIASES",
    "FINE",
    "GROUP_SIZES",
    "LEARNABLE",
    "PARTS",
    "WEIGHT_BITS",
    "Activations",
    "Basis",
    "Cache",
    "Codes",
    "CodesStore",
    "Learnable",
    "Packed",
    "QuantizationConfig",
    "QuantizationReport",
    "Quantized",
    "QuantizedWeight",
    "Trainable",
    "WeightSite",
    "Weights",
    "balanced_bases",
    "balancing_begins",
    "begun_basis",
    "cache_sites",
    "channel_scales",
    "check_kinds",
    "check_shares",
    "decode_scales",
    "double_quantize_program",
    "kinds_of_bases",
    "learned",
    "learned_bases",
    "matrices_of",
    "needs_of_bases",
    "pack",
    "quantize",
    "rewritten",
    "roles_of_bases",
    "site_errors",
    "takes_scales",
    "unpack",
    "unrounded_operands",
    "weight_name",
    "weight_sites",
]

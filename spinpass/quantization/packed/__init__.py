"""What is made of a quantized program: layers on packed codes, layers split by width, scales stored twice rounded."""

from .double_scales import decode_scales, double_quantize_program
from .mixed_rows import source_of, split_rows, splittable
from .program import Packed, pack, rewritten, unpack, weight_name
from .training import Trainable

__all__ = [
    "Packed",
    "Trainable",
    "decode_scales",
    "double_quantize_program",
    "pack",
    "rewritten",
    "source_of",
    "split_rows",
    "splittable",
    "unpack",
    "weight_name",
]

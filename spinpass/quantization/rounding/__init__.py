"""A matrix becomes codes with scales and zero points, and values get the range in which they are rounded."""

from .double import round_statistics
from .gptq import rounded_by_gptq
from .grid import Codes, rounded
from .moments import Moments
from .ranges import static_range, token_clip

__all__ = [
    "Codes",
    "Moments",
    "round_statistics",
    "rounded",
    "rounded_by_gptq",
    "static_range",
    "token_clip",
]

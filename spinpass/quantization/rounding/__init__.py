"""A matrix becomes codes with scales and zero points, and values get the range in which they are rounded."""

from .coded import Coded, laid_out
from .double import round_statistics
from .gptq import rounded_by_gptq
from .grid import Codes, rounded, stacked
from .moments import ExpertMoments, Moments, experts_moments
from .ranges import median_peak, static_range, token_clip

__all__ = [
    "Coded",
    "Codes",
    "ExpertMoments",
    "Moments",
    "experts_moments",
    "laid_out",
    "median_peak",
    "round_statistics",
    "rounded",
    "rounded_by_gptq",
    "stacked",
    "static_range",
    "token_clip",
]

"""A report people look at: what rotation does to a program's activations, its quantization error and its perplexity."""

from .measure import ReportRequest

__all__ = [
    "ReportRequest",
]

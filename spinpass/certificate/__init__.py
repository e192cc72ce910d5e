"""The proof that two programs, or a program and a file of it, compute one function."""

from .certificate import BOUNDS, Certificate, difference_of
from .files import (
    FileCertificate,
    FileComparison,
    FileOutput,
    as_tensor,
    compare_output,
    describe,
    narrowest_dtype,
    of_draws,
    on_draws,
    rounding_of,
    worst_of_runs,
)
from .programs import verify

__all__ = [
    "BOUNDS",
    "Certificate",
    "FileCertificate",
    "FileComparison",
    "FileOutput",
    "as_tensor",
    "compare_output",
    "describe",
    "difference_of",
    "narrowest_dtype",
    "of_draws",
    "on_draws",
    "rounding_of",
    "verify",
    "worst_of_runs",
]

"""The proof that two programs, or a program and a file of it, compute one function."""

from .certificate import BOUNDS, Certificate, compare
from .files import (
    FileCertificate,
    FileComparison,
    FileOutput,
    as_tensor,
    badness,
    compare_output,
    describe,
    narrowest_dtype,
)
from .programs import verify

__all__ = [
    "BOUNDS",
    "Certificate",
    "FileCertificate",
    "FileComparison",
    "FileOutput",
    "as_tensor",
    "badness",
    "compare",
    "compare_output",
    "describe",
    "narrowest_dtype",
    "verify",
]

"""All that calibration inputs decide: codes, ranges, and how many bits every weight gets."""

from .allocate import allocated
from .calibrator import Calibrator
from .curvature import each_backward, token_counts
from .lockstep import run_in_lockstep
from .site_error import site_errors

__all__ = [
    "Calibrator",
    "allocated",
    "each_backward",
    "run_in_lockstep",
    "site_errors",
    "token_counts",
]

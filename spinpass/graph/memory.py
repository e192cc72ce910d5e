"""Memory that was freed goes back to the system.

glibc keeps what it was given in case it is asked for again. Between values of many sizes little of it can be used
again: a run that reads one weight after the other would come to hold many times the largest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return found


def trim() -> None:
    """Give back what is free. It takes a millisecond, and nothing happens where the C library is another."""
    release = _malloc_trim()
    if release is not None:
        release(0)

"""Numbers as the page shows them."""

from __future__ import annotations

import math


def short(number: float) -> str:
    """A number with three digits, or in whole units from a thousand on; – for nan."""
    if not math.isfinite(number):
        return "–" if math.isnan(number) else "∞"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def with_error(value: float, error: float, digits: int) -> str:
    """A value ± its standard error, where there is one."""
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def small(value: float) -> str:
    """A small number as a power of ten; – for nan."""
    return "–" if math.isnan(value) else f"{value:.2e}"


def share(agreement: float | None) -> str:
    """A share in percent; nothing for None."""
    return "" if agreement is None else f"{agreement:.1%}"


def or_zero(value: float) -> float:
    """The number to sort by: 0 for nan."""
    return 0.0 if math.isnan(value) else value


def counted(count: int, what: str) -> str:
    """``1 window``, ``2 windows``."""
    return f"{count} {what}{'s' * (count != 1)}"


def times(ratio: float) -> str:
    """A ratio of perplexities, which is most often near 1: ``1.004``, ``1.05``, ``17.4``."""
    if not math.isfinite(ratio):
        return short(ratio)
    return f"{ratio:.3f}" if abs(ratio - 1) < 0.02 else f"{ratio:.2f}" if ratio < 10 else short(ratio)

"""Numbers as the page shows them."""

from __future__ import annotations

import math


def short(number: float) -> str:
    """Three digits, or whole thousands; – for nan."""
    if not math.isfinite(number):
        return "–" if math.isnan(number) else "∞"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def small(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2e}"


def share(agreement: float | None) -> str:
    return "" if agreement is None else f"{agreement:.1%}"


def or_zero(value: float) -> float:
    """0 for nan: to sort by."""
    return 0.0 if math.isnan(value) else value


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"

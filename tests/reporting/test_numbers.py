"""Numbers as the page shows them."""

from __future__ import annotations

import math

import pytest

from spinpass.reporting.numbers import short


@pytest.mark.parametrize(
    ("number", "text"), [(math.nan, "–"), (math.inf, "∞"), (12345.6, "12,346"), (0.01234, "0.0123"), (-3.0, "-3")]
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text

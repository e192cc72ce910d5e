"""Errors against the values around them: what a cache that is not full holds, and what is wrong in it."""

from __future__ import annotations

import torch
from torch import Tensor

from spinpass.certificate.vectors import vector_error

BOUND = 1e-9


def cache(written: int = 12, length: int = 128) -> Tensor:
    """The values of three heads, of which most places are not written."""
    held = torch.zeros(1, 3, length, 64, dtype=torch.float64)
    held[:, :, :written] = torch.randn(1, 3, written, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return held


def error(result: Tensor, noise: float = 1e-16) -> float:
    reference = cache()
    return vector_error(reference, result, BOUND, lambda: torch.full_like(reference, noise))


def test_rounding_of_earlier_steps_is_no_error() -> None:
    """It is many times that of the last step, which is all that the noise shows."""
    moved = cache() * (1 + 1e-13)
    assert 0 < error(moved) < 1e-11


def test_a_wrong_value_in_a_written_place_is_one() -> None:
    wrong = cache() * (1 + 1e-13)
    wrong[0, 1, 5, 7] += 1e-6
    assert error(wrong) > 1e-7


def test_a_value_where_nothing_is_written_is_one() -> None:
    wrong = cache() * (1 + 1e-13)
    wrong[0, 1, 50, 7] = 1e-6
    assert error(wrong) > 1e-7


def test_a_row_of_values_where_nothing_is_written_is_one() -> None:
    wrong = cache()
    wrong[0, 1, 50] = 1e-6
    assert error(wrong) > 1e-2

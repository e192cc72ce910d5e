"""Sweeps of which the default run takes a part: ``make slow`` runs the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], *, only: Collection[Any]) -> list[Any]:
    """Return the values as parameters of a test; all but ``only`` are left to the slow run."""
    listed = list(values)
    assert set(only) <= set(listed), f"{set(only) - set(listed)} are not among the values"
    slow = pytest.mark.slow
    return [
        value if value in only else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=slow)
        for value in listed
    ]

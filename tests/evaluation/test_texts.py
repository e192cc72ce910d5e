"""Windows of a text."""

from __future__ import annotations

import pytest

from spinpass.errors import ConfigError
from spinpass.evaluation import texts as evaluation


def test_windows_spread_over_the_text() -> None:
    assert evaluation.windows(list(range(100)), 10, 3) == [list(range(s, s + 10)) for s in (0, 33, 66)]
    assert evaluation.windows([7, 8], 2, 1) == [[7, 8]]


@pytest.mark.parametrize(
    ("length", "count", "reason"),
    [
        (1, 1, "at least one window of two tokens"),
        (4, 0, "0 windows of 4 tokens"),
        (6, 2, "need 12 tokens; the text has 10"),
    ],
)
def test_windows_that_do_not_fit(length: int, count: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        evaluation.windows(list(range(10)), length, count)

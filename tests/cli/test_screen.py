"""Progress in a log: every step as it begins, and how far a long one is."""

from __future__ import annotations

import io
import time

import pytest

from spinpass.cli import screen, steps


def lines(monkeypatch: pytest.MonkeyPatch, quick: float) -> list[str]:
    err = io.StringIO()
    monkeypatch.setattr(steps, "QUICK", quick)
    monkeypatch.setattr(steps, "SELDOM", 0.05)
    with screen.Screen(streams=(io.StringIO(), err)).steps() as shown:
        tick = shown.start("quantize [bold]")
        tick(1, 9)
        time.sleep(0.1)
        tick(2, 9)
        shown.begin("write")
    return [line.strip() for line in err.getvalue().splitlines() if line.strip()]


def test_a_log_says_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(monkeypatch, 0.0)
    assert [line.split(" s  ")[1] for line in found[:3]] == ["quantize [bold]", "quantize [bold]: 2 of 9", "write"]
    assert "quantize [bold] 0.1 s" in found[3]


def test_what_is_quick_writes_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(monkeypatch, 60.0)
    assert not [line for line in found if line.endswith((" s  write", " s  quantize [bold]"))]

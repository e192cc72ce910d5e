"""Progress in a log: every step as it begins, and how far a long one is."""

from __future__ import annotations

import io
import json
import time

import pytest

from spinpass.cli import screen, steps
from spinpass.progress import Course


def lines(monkeypatch: pytest.MonkeyPatch, quick: float) -> list[str]:
    err = io.StringIO()
    monkeypatch.setattr(steps, "QUICK", quick)
    monkeypatch.setattr(steps, "SELDOM", 0.05)
    monkeypatch.setattr(steps, "_LOOKED", 60.0)
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


def test_a_log_says_which_step_it_is_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(steps, "QUICK", 0.0)
    monkeypatch.setattr(steps, "SELDOM", 0.2)
    monkeypatch.setattr(steps, "_LOOKED", 0.05)
    with screen.Screen(streams=(io.StringIO(), err)).steps() as shown:
        shown.expect([("load", 10.0), ("quantize", 100.0), ("try", 10.0)])
        shown.begin("load")
        tick = shown.start("write", "bytes")  # which nobody expected
        tick(12_500_000, 50_000_000)
        time.sleep(0.5)
        shown.begin("try in onnxruntime")
    found = [line.split(" s  ")[1] for line in err.getvalue().splitlines() if " s  step" in line]
    assert found[:2] == ["step 1 of 3: load", "step 2 of 4: write"] and found[-1] == "step 4 of 4: try in onnxruntime"
    assert found[2].startswith("step 2 of 4: write: 12.5 MB of 50.0 MB, about ") and found[2].endswith(" left"), "silent, and yet told"


def test_programs_get_events(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(steps, "OFTEN", 0.0)
    monkeypatch.setattr(steps, "_LOOKED", 60.0)
    shown_to = screen.Screen(as_json=True, streams=(out, err))
    with shown_to.steps() as shown:
        shown.expect([("load \x1b", 3.0), ("quantize", 9.0)])
        shown.begin("load \x1b")
        shown.start("quantize")(3, 9)
    shown_to.error("no \x07", "ExportError")
    found = [json.loads(line) for line in err.getvalue().splitlines()]
    assert "\x1b" not in err.getvalue() and "\x07" not in err.getvalue()
    first, second, counted, done, error = found
    assert (first["event"], first["name"], first["step"], first["of"]) == ("step", "load \x1b", 1, 2)
    assert second["step"] == 2 and 5 <= second["left"] <= 9
    assert (counted["event"], counted["done"], counted["total"]) == ("progress", 3, 9)
    assert done["event"] == "done" and set(done["seconds"]) == {"load \x1b", "quantize"}
    assert error == {"event": "error", "error": "ExportError", "message": r"no \x07"}
    assert json.loads(out.getvalue())["ok"] is False


def test_what_is_left_goes_by_what_was() -> None:
    """A machine half as fast as foreseen; a step that does not come; the share of one that is under way."""
    course = Course([("a", 100.0), ("b", 50.0), ("c", 100.0)])
    course.enter("a", 0.0)
    assert course.left(0.0, None) == pytest.approx(250)
    assert course.left(50.0, 0.5) == pytest.approx(50 + 150 * 105 / 105)
    course.enter("c", 200.0)
    assert course.place == (3, 3) and course.left(0.0, None) == pytest.approx(100 * 205 / 105)
    assert course.left(400.0, 0.8) == pytest.approx(100)
    assert Course().left(1.0, 0.5) is None and Course().place is None


def test_a_step_that_was_not_foreseen_is_not_taken_for_another() -> None:
    """A model writes text to calibrate on long before its file is written."""
    course = Course([("load", 1.0), ("plan", 1.0), ("write", 50.0), ("try", 1.0)])
    for name, place in (("load", 1), ("write text 1", 2), ("plan", 3), ("write", 4), ("try in onnxruntime, OrtModel", 5)):
        course.enter(name, 1.0)
        assert course.place == (place, 4 if name == "load" else 5)

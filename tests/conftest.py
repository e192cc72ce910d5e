"""What every test has: trials of written folders in a process that is there already, and traces that were made before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spinpass.loading import models
from spinpass.runtime import trial
from tests.support.traced import Remembered
from tests.support.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[type[Warm]]:
    yield Warm
    Warm.end()


@pytest.fixture(autouse=True)
def trials_are_warm(warm: type[Warm], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A process of its own takes seconds to import a runtime; commands, and tests marked ``cold``, start one."""
    if request.node.get_closest_marker("cold") is None:
        monkeypatch.setattr(trial, "Elsewhere", Warm)


TRACES = Remembered(models.export_decoder)


@pytest.fixture(autouse=True)
def traces_are_remembered(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """But where loading is what is tested."""
    if "tests/loading" not in str(request.path):
        monkeypatch.setattr(models, "export_decoder", TRACES)

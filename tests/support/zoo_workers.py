"""A worker of the zoo in this process."""

from __future__ import annotations

import pytest

from benchmarks.zoo import records, worker
from benchmarks.zoo.records import Record
from benchmarks.zoo.worker import Job


def record_of(job: Job, monkeypatch: pytest.MonkeyPatch) -> Record:
    """The record that the job leaves, run without the limits, which would be those of the tests too."""
    monkeypatch.setattr(worker, "limit_memory", lambda: None)
    monkeypatch.setattr(worker, "limit_time", lambda seconds: None)
    worker.work(job)
    found = records.read(job.record)
    assert found is not None
    return found

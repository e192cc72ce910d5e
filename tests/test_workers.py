"""Ranks speak with each other; one that is lost, or fails, ends all others with its name."""

from __future__ import annotations

import json
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from spinpass.workers import Team, joined_team, launched
from tests.support import ranks

BEGIN = """
import json, os, signal, sys, time
import torch
from spinpass import errors
from spinpass.workers import joined_team

def ended(act):
    try:
        with joined_team() as team, team.as_one():
            print(json.dumps(act(team)))
    except errors.SpinpassError as error:
        print(json.dumps([type(error).__name__, str(error), team.speaks]))
        sys.exit(3)
"""


def test_a_rank_of_nothing_is_a_process_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers number nodes in the same variable."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == (0, 1)


def test_a_process_by_itself_is_a_team() -> None:
    with joined_team() as team, team.as_one():
        assert (team.rank, team.size, team.leads, team.speaks) == (0, 1, True, True)
        assert team.dealt("abc") == list("abc") and team.told({"a": 1}) == {"a": 1} and team.gathered(2) == [2]
        tensor = torch.ones(2)
        assert team.sum(tensor) is tensor and team.broadcast(tensor, 0) is tensor
    with pytest.raises(KeyError), Team().as_one():
        raise KeyError


def test_ranks_share_what_they_have(tmp_path: Path) -> None:
    script = """
def act(team):
    total = team.sum(torch.arange(3, dtype=torch.float64) + team.rank)
    codes = team.sum(torch.full((2,), team.rank, dtype=torch.uint8))
    other = team.broadcast(torch.full((2, 2), float(team.rank)), 1)
    return [team.dealt(range(5)), total.tolist(), codes.tolist(), other.tolist(), team.told("by 0" if team.leads else None),
            team.gathered(team.rank * 0.1), team.told(7), team.leads]
ended(act)
"""
    found = ranks.run_script(tmp_path, BEGIN + script, size=3)
    assert [each.returncode for each in found] == [0, 0, 0], found
    for rank, each in enumerate(found):
        alike = [[3.0, 6.0, 9.0], [3, 3], [[1.0, 1.0], [1.0, 1.0]], "by 0", [0.0, 0.1, 0.2], 7]
        assert json.loads(each.stdout) == [list(range(5))[rank::3], *alike, rank == 0]
        assert not each.stderr, "and nothing else is printed"


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        ("errors.ConfigError('it is 7: take 8')", "ConfigError", "it is 7: take 8"),
        ("KeyError('seven')", "WorkerError", "rank 1 of 2 failed, unexpected KeyError: 'seven'"),
    ],
)
def test_the_error_of_a_rank_is_that_of_all(tmp_path: Path, raised: str, kind: str, message: str) -> None:
    """Also of one that waits for nobody, and before the one that failed has gone."""
    script = f"""
def act(team):
    if team.rank == 1:
        raise {raised}
    for _ in range(2000):
        time.sleep(0.05)
ended(act)
"""
    first, second = ranks.run_script(tmp_path, BEGIN + script)
    assert first.returncode == 3 and json.loads(first.stdout) == [kind, message, True], first
    assert second.returncode in (1, 3) and not first.stderr


@pytest.mark.parametrize(
    ("lost", "wait"),
    [(1, "team.sum(torch.ones(4))"), (1, "time.sleep(100)"), (0, "team.gathered(1)"), (0, "team.sum(torch.ones(4))")],
)
def test_a_rank_that_is_lost_is_named(tmp_path: Path, wait: str, lost: int) -> None:
    """Whichever has the store, whatever the other waits for."""
    script = f"""
from spinpass import workers
workers._SILENT = 5.0
def act(team):
    team.gathered(None)
    if team.rank == {lost}:
        os.kill(os.getpid(), signal.SIGKILL)
    {wait}
ended(act)
"""
    found = ranks.run_script(tmp_path, BEGIN + script, seconds=90)
    assert found[lost].returncode == -signal.SIGKILL
    left = found[1 - lost]
    assert left.returncode == 3, left
    kind, message, speaks = json.loads(left.stdout)
    assert kind == "WorkerError" and speaks
    assert message.startswith(f"rank {lost} of 2 was lost (") and "run the same command again" in message


def test_a_rank_that_is_lost_between_a_word_and_its_reading_is_named(tmp_path: Path) -> None:
    script = """
class Slow:
    def __init__(self, store):
        self.set, self.check, self._get = store.set, store.check, store.get
    def get(self, key):
        time.sleep(3)
        return self._get(key)
def act(team):
    if team.rank == 1:
        team._words = Slow(team._words)
    team.gathered(None)
    os.kill(os.getpid(), signal.SIGKILL)
ended(act)
"""
    left = ranks.run_script(tmp_path, BEGIN + script, seconds=90)[1]
    assert left.returncode == 3, left
    kind, message, _ = json.loads(left.stdout)
    assert kind == "WorkerError" and message.startswith("rank 0 of 2 was lost (")


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    script = """
from spinpass import workers
workers._JOINING = 1.0
try:
    with joined_team():
        pass
except errors.WorkerError as error:
    print(error)
"""
    alone = [sys.executable, "-c", BEGIN + script]
    (found,) = ranks.run(tmp_path, alone, size=2)
    assert found.stdout.startswith("rank 0 of 2 does not reach the others: "), found
    # torchrun has the store itself
    held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    (found,) = ranks.run(tmp_path, alone, size=2, port=held.port, extra={"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found.stdout.strip() == "rank 1 of 2 did not come within 1 s: start it", found


def test_a_rank_that_is_ended_while_it_waits_says_so(tmp_path: Path) -> None:
    """By a launcher, as another has failed before it came."""
    script = """
import threading
threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    with joined_team():
        pass
except errors.WorkerError as error:
    print(error)
"""
    held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    command = [sys.executable, "-c", BEGIN + script]
    (found,) = ranks.run(tmp_path, command, size=2, port=held.port, extra={"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found.stdout.startswith("rank 1 of 2 was lost (no sign of it for 4 s)") and not found.stderr, found


def test_an_error_of_one_rank_alone_is_that_of_all_and_they_go_on(tmp_path: Path) -> None:
    script = """
class OfARuntime(errors.ExportError):
    pass
def failing(team):
    if team.rank == 0:
        raise OfARuntime("the file died")
    return team.rank
def act(team):
    try:
        team.made(lambda: failing(team))
    except errors.ExportError as error:
        return [type(error).__name__, str(error), team.made(lambda: team.rank), team.told(7)]
ended(act)
"""
    found = ranks.run_script(tmp_path, BEGIN + script, seconds=60)
    assert [each.returncode for each in found] == [0, 0], found
    said = [json.loads(each.stdout) for each in found]
    assert said == [["OfARuntime", "the file died", [0, 1], 7], ["ExportError", "the file died", [0, 1], 7]]
    with pytest.raises(KeyError):
        Team().made(lambda: {}["no error of spinpass"])


def test_a_file_that_dies_while_it_is_scored_keeps_nobody_waiting(tmp_path: Path) -> None:
    script = """
from spinpass.evaluation import compare
class Model:
    def logits(self, ids):
        return torch.zeros(len(ids), 9)
class File(Model):
    def logits(self, ids):
        if ids[0] == 2:  # of the window that rank 0 reads second
            raise errors.ExportError("the file died")
        return super().logits(ids)
def act(team):
    try:
        compare(Model(), File(), [[k, 1, 1] for k in range(4)], team=team)
    except errors.ExportError as error:
        return [str(error), team.gathered(team.rank)]
ended(act)
"""
    found = ranks.run_script(tmp_path, BEGIN + script, seconds=60)
    assert [json.loads(each.stdout) for each in found] == [["the file died", [0, 1]]] * 2, found

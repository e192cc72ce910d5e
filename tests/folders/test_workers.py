"""An export by several workers writes what one worker does; one that is lost ends it, and it can be gone on with."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spinpass.exporters.onnx import writer
from spinpass.folders import export
from spinpass.formats import KeptWork
from spinpass.loading import streamed
from spinpass.progress import Silent
from spinpass.quantization.calibration import dealing
from tests.support import folders, ranks

CASES: dict[str, dict[str, Any]] = {  # of the model's weights, files beside the graph are written by all
    "floats": {"bits": 16},
    "to nearest": {"quantize": "w4g16-rtn-head8-embed8"},
}
GPTQ: dict[str, Any] = {"quantize": "w4g16-gptq-head8-embed8", "calibration_windows": 3}
OPTIONS: dict[str, Any] = {"certify": False}
SETTINGS = """
import json, sys
from pathlib import Path
from spinpass import errors
from spinpass.exporters.onnx import writer
from spinpass.folders import export
from spinpass.loading import streamed
from spinpass.progress import Silent
from spinpass.quantization.calibration import dealing
from spinpass.workers import joined_team
writer.export.__kwdefaults__["external_threshold"] = 1000
streamed.STREAMED_BYTES = 0
dealing._ROWS = 24
"""
COUNTED = """
from spinpass.exporters.onnx import shares
from spinpass.exporters.onnx.streamed import Piece
written, rounded = [0], [0]
def count(counter, number, then):
    counter[0] += number
    return then()
pieces, part = shares.pieces_of, dealing._rounded
shares.pieces_of = lambda held: [
    Piece(each.size, lambda file, each=each: count(written, each.size, lambda: each.write(file))) for each in pieces(held)
]
dealing._rounded = lambda *args: count(rounded, 1, lambda: part(*args))
"""
TOGETHER = """
model, out, cases = sys.argv[1:]
with joined_team() as team:
    for name, options in json.loads(cases).items():
        made = export(model, Path(out, name), certify=False, team=team, **options)
        assert (made.report is None) == (team.rank > 0) and "model.onnx" in made.files
print(json.dumps([written[0], rounded[0]]))
"""


class Told(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def begin(self, step: str) -> None:
        self.steps.append(step)
        super().begin(step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("workers") / "model")


@pytest.fixture(scope="module")
def by_one(model: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(writer.export.__kwdefaults__, "external_threshold", 1000)
        patch.setattr(streamed, "STREAMED_BYTES", 0)
        patch.setattr(dealing, "_ROWS", 24)
        for name, options in CASES.items():
            export(model, model.parent / "one" / name, **OPTIONS, **options)
    return model.parent / "one"


@pytest.fixture(scope="module")
def by_two(model: Path) -> Path:
    """Two processes with temporary folders of their own, as nodes that share the folder of OUT have them."""
    script = SETTINGS + COUNTED + TOGETHER
    found = ranks.run_script(model.parent, script, model, model.parent / "two", json.dumps(CASES))
    assert [each.returncode for each in found] == [0, 0], found
    counts = np.array([json.loads(each.stdout.splitlines()[-1]) for each in found])
    assert (counts / counts.sum(0) > 0.25).all(), f"each writes and rounds something: {counts}"
    return model.parent / "two"


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_the_same_byte_for_byte(by_one: Path, by_two: Path, case: str) -> None:
    one, two = by_one / case, by_two / case
    assert sorted(os.listdir(one)) == sorted(os.listdir(two)) and "model.onnx.data" in os.listdir(one)
    for name in os.listdir(one):
        if name not in ("spinpass.json", "README.md"):  # which hold times
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (json.loads((folder / "spinpass.json").read_text())["quantization"] for folder in (one, two))
    assert first == second
    assert sorted(os.listdir(by_two)) == sorted(CASES), "and no folder of work is left"


KILLED = """
import os, signal
from spinpass import workers
from spinpass.formats import KeptWork
workers._SILENT = 20.0  # seconds; two minutes are waited for otherwise
rounded, count = dealing.Dealer.rounded, [0]
def killed(self, jobs, known):
    count[0] += 1
    if count[0] == 4 and self.team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rounded(self, jobs, known)
dealing.Dealer.rounded = killed
try:
    with joined_team() as team:
        export(sys.argv[1], sys.argv[2], certify=False, team=team, **json.loads(sys.argv[3]))
except errors.WorkerError as error:
    print(error)
"""


def test_a_rank_that_is_lost_ends_the_run_and_one_goes_on_with_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "gptq"
    first, second = ranks.run_script(tmp_path, SETTINGS + KILLED, model, out, json.dumps(GPTQ))
    assert second.returncode == -signal.SIGKILL and first.returncode == 0
    assert first.stdout.startswith("rank 1 of 2 was lost"), first
    kept = KeptWork(out.parent / ".gptq.spinpass" / "work").count
    assert not out.exists() and kept > 2
    told = Told()
    export(model, out, steps=told, **OPTIONS, **GPTQ)
    assert f"go on from {kept} weights that are rounded" in told.steps
    assert os.listdir(out.parent) == ["gptq"]


def spinpass(*words: object) -> list[object]:
    return [sys.executable, "-m", "spinpass", *words]


def test_one_rank_says_what_is_wrong(model: Path, tmp_path: Path) -> None:
    """By torchrun, with two ranks that fail alike; and where one alone does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "spinpass"]
    words = ["export", str(model), str(tmp_path / "out"), "--quantize", "w4g16-gptq", "--samples", "1"]
    (found,) = ranks.run(tmp_path, [*torchrun, *words], extra={"WORLD_SIZE": "1"})
    message = "spinpass: 2 workers and 1 calibration windows: start at most 1 workers, or read more windows (--samples)"
    assert found.returncode and (found.stdout + found.stderr).count("calibration windows") == 1, found
    assert message in found.stderr and found.stderr.count("Traceback") <= 1, "that of torchrun itself"


def test_ranks_of_two_commands_are_refused(model: Path, tmp_path: Path) -> None:
    words = [spinpass("export", model, tmp_path / "out", "--quantize", "w4g16-gptq", "--samples", n) for n in (2, 3)]
    first, second = ranks.run(tmp_path, *words)
    assert (first.returncode, second.returncode) == (2, 2), (first, second)
    assert "spinpass: rank 1 of 2 has another text than rank 0: start all of them with one command" in first.stderr
    assert not second.stderr and not second.stdout and not (tmp_path / "out").exists()


def test_what_one_process_does_is_refused_to_several(model: Path, tmp_path: Path) -> None:
    first, second = ranks.run(tmp_path, *[spinpass("plan", model)] * 2)
    assert (first.returncode, second.returncode) == (2, 2), (first, second)
    assert first.stderr.strip() == "spinpass: spinpass plan is done by one process: start it without torchrun"
    assert not second.stderr

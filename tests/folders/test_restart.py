"""An export that is stopped is finished by the same command, which gives the same bytes as one that is not."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spinpass import RotationConfig
from spinpass.errors import ConfigError, ExportError, VerificationError
from spinpass.folders import ExportRequest, Known, carry_out, export, making
from spinpass.formats import FileHash, KeptWork
from spinpass.loading import SourceFiles
from spinpass.progress import Silent
from spinpass.quantization import Codes, QuantizedWeight, Weights
from spinpass.quantization.calibration.dealing import Dealer
from tests.support import folders
from tests.support.sweeps import quick

OPTIONS: dict[str, Any] = {"quantize": "w4g16-gptq-a8-head8-embed8", "calibration_windows": 2, "certify": False}
FILES = ("model.onnx", "recipe.yaml", "config.json")


class Told(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def begin(self, step: str) -> None:
        self.steps.append(step)
        super().begin(step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("restart") / "model")


@pytest.fixture(scope="module")
def unbroken(model: Path) -> dict[str, bytes]:
    out = model.parent / "unbroken"
    export(model, out, RotationConfig(form="online"), **OPTIONS)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def work(out: Path) -> Path:
    return out.parent / f".{out.name}.spinpass" / "work"


def stopped(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let a run end when so many weights are kept."""
    put, kept = KeptWork.put, list[str]()

    def stop(self: KeptWork, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        if len(kept) == after:
            raise error
        kept.append(name)
        return put(self, name, weight)

    monkeypatch.setattr(KeptWork, "put", stop)


@pytest.mark.parametrize("after", quick([0, 1, 9], only=[1]))
def test_it_goes_on_from_what_is_rounded(
    model: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped(patch, after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(model, out, RotationConfig(form="online"), **OPTIONS)
    assert not out.exists() and KeptWork(work(out)).count == after
    rounded = list[Any]()
    monkeypatch.setattr(Dealer, "rounded", lambda self, jobs, known, made=Dealer.rounded: (rounded.extend(jobs), made(self, jobs, known))[1])
    told = Told()
    carry_out(ExportRequest(str(model), out, RotationConfig(form="online"), **OPTIONS), told)
    assert contents(out) == unbroken
    weights = len(ExportedWeights(out).names)
    assert len(rounded) == weights - after and (f"go on from {after} weights that are rounded" in told.steps) == bool(after)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the work goes when the folder is there"


class ExportedWeights:
    def __init__(self, out: Path) -> None:
        import json

        self.names = list(json.loads((out / "spinpass.json").read_text())["quantization"]["weights"])


KILLED = """
import os, signal, sys
from spinpass import RotationConfig
from spinpass.folders import export
from spinpass.formats import KeptWork
put, count = KeptWork.put, [0]
def killed(self, name, weight):
    count[0] += 1
    if count[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, name, weight)
KeptWork.put = killed
export(sys.argv[1], sys.argv[2], RotationConfig(form="online"), quantize="w4g16-gptq-a8-head8-embed8", calibration_windows=2, certify=False)
"""


def test_after_a_kill_too(model: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, model, out], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert KeptWork(work(out)).count == 4
    export(model, out, RotationConfig(form="online"), **OPTIONS)
    assert contents(out) == unbroken and os.listdir(tmp_path) == ["out"]


def test_the_work_of_another_run_is_refused(
    model: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of a run which ended with an error is not kept."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(model, out, RotationConfig(form="online"), **OPTIONS)
    with pytest.raises(ConfigError, match=r"another configuration, another scheme: run that again to finish it, or delete the folder"):
        export(model, out, RotationConfig(form="offline"), **(OPTIONS | {"quantize": "w4g16-gptq-a8"}))
    assert KeptWork(work(out)).count == 2, "it can still be finished"
    export(model, out, RotationConfig(form="online"), **OPTIONS)
    assert contents(out) == unbroken and os.listdir(tmp_path) == ["out"]
    with monkeypatch.context() as patch:
        stopped(patch, 2, ExportError("no"))
        with pytest.raises(ExportError):
            export(model, tmp_path / "other", RotationConfig(form="online"), **OPTIONS)
    assert os.listdir(tmp_path) == ["out"]


def test_what_never_comes_to_the_work_leaves_it(
    model: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that is not there, a disk that is full, another program for the same folder: then the first again."""
    out, online = tmp_path / "out", RotationConfig(form="online")
    with monkeypatch.context() as patch:
        stopped(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(model, out, online, **OPTIONS)
    with pytest.raises(ConfigError, match="no such file"):
        export(model, out, online, **(OPTIONS | {"calibration": "none.txt"}))
    for other in ({"bits": 16}, {"int4": True}):
        with pytest.raises(ConfigError, match="holds the work of a run that was stopped"):
            export(model, out, online, certify=False, **other)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(KeptWork, "_put", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ExportError, match="disk is full|No space left"):
            export(model, out, online, **OPTIONS)
    assert KeptWork(work(out)).count == 3
    export(model, out, online, **OPTIONS)
    assert contents(out) == unbroken and os.listdir(tmp_path) == ["out"]


@pytest.mark.cold
def test_a_trial_that_the_system_ends_leaves_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinpass.runtime.elsewhere._CHILD", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ExportError, match="this machine's memory is not enough: "):
        export(model, tmp_path / "out", RotationConfig(form="online"), **OPTIONS)
    assert not (tmp_path / "out").exists() and KeptWork(work(tmp_path / "out")).count > 2


def test_weights_that_change_underneath_are_seen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, and before what such a run fails with is believed. Nothing appears, and its work goes."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    weights, out = own / "model.safetensors", tmp_path / "out"
    whole = weights.read_bytes()
    put = KeptWork.put

    def changing(self: KeptWork, name: str, weight: QuantizedWeight) -> QuantizedWeight:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        return put(self, name, weight)

    for fails in (False, True):
        weights.write_bytes(whole)
        with monkeypatch.context() as patch:
            patch.setattr(KeptWork, "put", changing)
            if fails:
                patch.setattr(making, "last_token", lambda _: (_ for _ in ()).throw(VerificationError("not the same")))
            with pytest.raises(ExportError, match=r"model.safetensors is not what it was when the run began: .*; export again"):
                export(own, out, RotationConfig(form="online"), last_logits=True, **OPTIONS)
        assert os.listdir(tmp_path) == ["model"]
    weights.unlink()
    with pytest.raises(ExportError, match="is not what it was"):
        SourceFiles({weights.name: FileHash(len(whole), "")}, (weights,)).check_unchanged()


def test_the_disk_is_asked_for_what_is_still_to_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    check = Known.check_disk

    def noted(self: Known, *args: Any, kept: int, **how: Any) -> None:
        asked.append(kept)
        check(self, *args, kept=kept, **how)

    monkeypatch.setattr(Known, "check_disk", noted)
    with monkeypatch.context() as patch:
        stopped(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(model, tmp_path / "out", RotationConfig(form="online"), **OPTIONS)
    there = sum(file.stat().st_size for file in work(tmp_path / "out").glob("*.codes"))
    with monkeypatch.context() as patch:
        stopped(patch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(model, tmp_path / "out", RotationConfig(form="online"), **OPTIONS)
    assert asked == [0, there] and there > 0


@pytest.mark.parametrize("content", ["[]", "null", "{", ""])
def test_work_of_nobody_knows_what_is_begun_anew(tmp_path: Path, content: str) -> None:
    KeptWork.of(tmp_path / "work", {"model": "m"}).put("w", weight(0))
    (tmp_path / "work" / "run.json").write_text(content)
    assert KeptWork.of(tmp_path / "work", {"model": "m"}).count == 0


def test_no_bit_of_what_says_what_codes_are_goes_unseen(tmp_path: Path) -> None:
    kept = KeptWork.of(tmp_path / "work", {})
    kept.put("w", weight(0))
    (file,) = (each for each in (tmp_path / "work").glob("*.json") if each.name != "run.json")
    content = file.read_bytes()
    for at in range(0, len(content), 3):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        file.write_bytes(changed)
        assert kept.get("w", Weights(4, 32)) is None, content[max(0, at - 20) : at + 20]


def weight(seed: int) -> QuantizedWeight:
    drawn = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (6, 20), generator=drawn, dtype=torch.uint8)
    index = torch.arange(20) // 8
    codes = Codes(q, torch.rand(6, 3, generator=drawn), torch.full((6, 3), 8, dtype=torch.uint8), 4, True, index, (4, 2, 4))
    return QuantizedWeight(codes, 1, Weights(4, 32), 0.1 + seed, 2, (3, 4))


def test_what_is_kept_is_the_same_again(tmp_path: Path) -> None:
    kept = KeptWork.of(tmp_path / "work", {"model": "m"})
    for seed in range(3):
        kept.put(f"w{seed}", weight(seed))
    again = KeptWork.of(tmp_path / "work", {"model": "m"})
    for seed in range(3):
        found, wanted = again.get(f"w{seed}", Weights(4, 32)), weight(seed)
        assert found is not None and (found.error, found.stack, found.tokens, found.scheme) == (wanted.error, 2, (3, 4), wanted.scheme)
        for part in ("q", "scales", "zeros", "index"):
            assert torch.equal(getattr(found.codes, part), getattr(wanted.codes, part))
        assert (found.codes.bits, found.codes.symmetric, found.codes.group_bits) == (4, True, (4, 2, 4))
    assert again.get("w0", Weights(4, 16)) is None and again.get("w3", Weights(4, 32)) is None
    assert again.of_kind("original").get("w0", Weights(4, 32)) is None


@pytest.mark.parametrize("damage", ["codes", "json", "shorter", "gone"])
def test_what_is_damaged_is_done_again(tmp_path: Path, damage: str) -> None:
    kept = KeptWork.of(tmp_path / "work", {})
    kept.put("w", weight(0))
    file = next(each for each in (tmp_path / "work").iterdir() if each.suffix == (".json" if damage == "json" else ".codes") and each.name != "run.json")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-64] if damage == "shorter" else content)
    assert kept.get("w", Weights(4, 32)) is None

"""Files whose operators round as they run are held to a wide bound: what it would hide, the file without that shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from spinpass.errors import VerificationError
from spinpass.evaluation import ProgramScorer
from spinpass.exporters import onnx as exporter
from spinpass.folders import export, judge
from spinpass.loading import load_model
from spinpass.quantization import quantize
from spinpass.runtime import Answer
from tests.support.folders import WORDS, model_folder
from tests.support.sweeps import quick

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), "llama", head_dim=16, eos_token_id=2, pad_token_id=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(4000)))
    return file


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Change], None]:
    """Let a writer of the exporter write something else."""

    def change(writer: str, edit: Change) -> None:
        write = getattr(exporter, writer)

        def wrong(source: Path, destination: Path, *args: Any, **options: Any) -> Any:
            report = write(source, destination, *args, **options)
            model = onnx.load(report.path)
            edit(model)
            onnx.save(model, report.path)
            return report

        monkeypatch.setattr(exporter, writer, wrong)

    return change


def attention(model: onnx.ModelProto) -> list[Any]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def sharper(model: onnx.ModelProto) -> None:
    """Multiply the scale of the first attention by 1.2."""
    for attribute in attention(model)[0].attribute:
        if attribute.name == "scale":
            attribute.f *= 1.2


def trials(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((out / "spinpass.json").read_text())["trials"]
    return {(each["runtime"], each["case"]): each for each in found if not each["reason"]}


@pytest.mark.parametrize("kind", quick(["int4", "both"], only=["both"]))
def test_without_its_rounding_the_file_is_the_program(source: Path, text: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"int4": True}
    if kind != "int4":
        options |= {"kv_cache": "int8", "calibration": text, "calibration_windows": 4}
    export(source, tmp_path / "out", None, **options)
    found = trials(tmp_path / "out")
    for case in ("prompt", "padded batch", "next turn"):
        assert found["onnxruntime, unrounded", case]["error"] < 1e-5 < found["onnxruntime, unrounded", case]["bound"]
        assert found["onnxruntime", case]["error"] > 1e-4  # which is what the wide bound is for
    assert not [file for file in (tmp_path / "out").iterdir() if "unrounded" in file.name]


def test_a_wrong_attention_is_seen_behind_rounded_products(source: Path, tmp_path: Path, changed: Any) -> None:
    changed("quantize_4bit", sharper)
    with pytest.raises(VerificationError, match="does not compute what the program does"):
        export(source, tmp_path / "out", None, int4=True)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_attention_is_seen_behind_rounded_activations(source: Path, tmp_path: Path, changed: Any) -> None:
    """The program rounds by tokens what the kernel rounds by blocks; without either they are equal."""
    export(source, tmp_path / "right", None, quantize="w4g32-rtn-a8-head8")
    found = trials(tmp_path / "right")
    assert found["onnxruntime, unrounded", "prompt"]["error"] < 0.01 < found["onnxruntime", "prompt"]["bound"]
    changed("export", sharper)
    with pytest.raises(VerificationError, match="does not compute what the program does"):
        export(source, tmp_path / "out", None, quantize="w4g32-rtn-a8-head8")
    assert [each.name for each in tmp_path.iterdir()] == ["right"]


def test_a_wrong_attention_is_seen_behind_a_rounded_cache(
    source: Path, text: Path, tmp_path: Path, changed: Any
) -> None:
    changed("quantize_cache", sharper)
    with pytest.raises(VerificationError, match="does not compute what the program does"):
        export(source, tmp_path / "out", None, kv_cache="int8", calibration=text, calibration_windows=4, bits=16)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_shows_too_little_is_named(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinpass.folders.onnx.KERNEL_BOUND", 1e-9)
    with pytest.raises(VerificationError, match=r"Calibrate with text .* or leave out --kv-cache"):
        export(source, tmp_path / "out", None, kv_cache="int8", calibration=text, calibration_windows=4, bits=16)


@pytest.mark.parametrize("change", [0.0, 0.5], ids=["as it rounds", "otherwise"])
def test_ties_are_allowed_what_rounding_does_to_the_program_itself(source: Path, change: float) -> None:
    """A runtime that computes what the program does, but for its roundings, and one that adds half as much again."""
    rounded = quantize(load_model(source).program, "w8-rtn-a8").program
    tokens = [3, 9, 4, 17, 5, 11, 8]
    found = ProgramScorer(rounded).logits(tokens, judge._Shaken(7))[-1:]
    made = found + change * found.flip(-1)
    answer = Answer([[*tokens, int(made.argmax())]], [[len(tokens)]], [made])
    judging = judge.Judge(rounded, 1e-12)  # so that any rounding is more
    if change:
        with pytest.raises(VerificationError, match="does not compute what the program does"):
            judging("here", "a text", answer)
    else:
        trial = judging("here", "a text", answer)
        assert trial.error is not None and trial.bound is not None and 1e-12 < trial.error <= trial.bound < 1e-3

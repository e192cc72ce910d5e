"""A folder written from Python: what ``spinpass export`` does, without a terminal."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import spinpass
from spinpass import RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import SHIPPED_TEXT
from spinpass.folders import ExportRequest, export
from spinpass.progress import Silent
from spinpass.runtime.decoder import OrtDecoder
from tests.support import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


def test_a_folder_that_runs(model: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "out", Silent()
    written = export(model, str(out), spinpass.RotationConfig(form="online"), int4=True, steps=steps)
    assert {path.name for path in out.iterdir()} == set(written.files) >= {"model.onnx", "tokenizer.json"}
    assert json.loads((out / "spinpass.json").read_text()) == json.loads(json.dumps(written.manifest))
    assert written.manifest["record"]["certificate"]["ok"] and written.report.certificate is not None
    assert {space["form"] for space in written.manifest["plan"]["spaces"] if space["rotation"] == "R1"} == {"online"}
    assert {"load", "rotate", "certify", "pack"} <= steps.seconds.keys()
    assert len(OrtDecoder(out).generate([5, 6, 7], 4, end=()).tokens) == 4


def test_caches_have_one_name_in_the_file_the_record_and_the_certificates(model: Path, tmp_path: Path) -> None:
    manifest = export(model, tmp_path / "out", bits=16).manifest
    record, file = manifest["record"], manifest["onnx"]
    assert {"past_key_values.0.key", "past_key_values.1.value"} < set(file["inputs"])
    assert record["inputs"] and set(record["inputs"]) <= set(file["inputs"])
    assert record["outputs"] and set(record["outputs"]) <= set(file["outputs"])
    assert [o["name"] for o in record["certificate"]["outputs"]] == [o["name"] for o in file["certificate"]["outputs"]]
    assert "past_key_values_" not in json.dumps(manifest["record"])


def test_the_original_without_a_rotation(model: Path, tmp_path: Path) -> None:
    written = export(model, tmp_path / "out", None, bits=16)
    assert written.manifest["plan"] is None and written.report.hadamards == 0


def test_the_function_takes_what_the_request_holds() -> None:
    parameters = inspect.signature(export).parameters
    held = {field.name: field.default for field in fields(ExportRequest) if field.init and field.name not in ("model", "out", "config")}
    assert {name: p.default for name, p in parameters.items() if name in held} == held
    assert parameters.keys() - held.keys() == {"model", "out", "config", "steps", "team"}
    assert parameters["config"].default == spinpass.RotationConfig(), "rotated unless told otherwise"


def test_what_means_nothing_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--int4 rounds the weights by itself"):
        export(model, tmp_path / "out", int4=True, quantize="w4-rtn")
    assert not (tmp_path / "out").exists()


def test_what_needs_a_text_has_that_of_the_package(model: Path, tmp_path: Path) -> None:
    def text(**options: Any) -> str | Path | None:
        return ExportRequest(str(model), tmp_path, None, **options).calibration

    assert text(quantize="w4") == text(bits=16, kv_cache="int8") == text() == SHIPPED_TEXT and text(quantize="w4-rtn") is None
    assert text(quantize="w4", calibration=Path("mine.txt")) == Path("mine.txt")
    assert len(SHIPPED_TEXT.read_text(encoding="utf-8")) > 200_000


def test_export_says_what_to_know_of_a_combination() -> None:
    def notes(**options: Any) -> str:
        return " ".join(ExportRequest("model", Path("out"), **options).notes)

    rotated, online = RotationConfig(), RotationConfig(form="online")
    assert "seldom gain from a rotation" in notes(config=rotated, int4=True) and not notes(config=None, int4=True)
    assert "slower than with -a8" in notes(config=online, quantize="w4g128-rtn")
    assert "--form online" in notes(config=rotated, quantize="w4-rtn-a8")
    assert "no bfloat16 kernels" in notes(config=None, dtype="bfloat16")
    assert not notes(config=online, quantize="w4-rtn-a8") and not notes(config=rotated)

    alone, own = RotationConfig(rotations="R2,R4"), RotationConfig(matrices={"R1": torch.eye(8)})
    assert "the recipe has --form online" in notes(config=RotationConfig(kind="random-hadamard"), bits=4)
    assert not notes(config=alone, bits=4) and not notes(config=online, bits=4) and not notes(config=alone, quantize="w4-rtn-a8")
    assert "no recipe.yaml is written" in notes(config=own) and "no recipe.yaml" not in notes(config=online, bits=4)

"""A file against programs it was not written from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ExportError, VerificationError
from spinpass.exporters.names import cache_names
from spinpass.exporters.onnx import writer as onnx
from spinpass.exporters.onnx.certificate import certify_onnx
from spinpass.exporters.onnx.compare import compare_file
from tests.support import programs


@pytest.fixture(scope="module")
def original() -> ExportedProgram:
    return programs.program("llama_tied", "cache", torch.float32)


@pytest.fixture(scope="module")
def rotated(original: ExportedProgram) -> ExportedProgram:
    return spinpass.transform(original, spinpass.RotationConfig(kind="random-hadamard", seed=1))


@pytest.fixture(scope="module")
def file(rotated: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx.export(rotated, tmp_path_factory.mktemp("rotated"), **cache_names(rotated)).path


@pytest.fixture(scope="module")
def plain_file(original: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx.export(original, tmp_path_factory.mktemp("original")).path


def test_caches_are_translated(
    original: ExportedProgram, rotated: ExportedProgram, file: Path, plain_file: Path
) -> None:
    assert not certify_onnx(original, file).ok  # the caches differ, and a cache taken for another spoils the logits
    other = spinpass.transform(original, spinpass.RotationConfig(kind="random-hadamard", seed=2))
    for program, path in (
        (original, file),
        (rotated, file),
        (other, file),
        (rotated, plain_file),
        (original, plain_file),
    ):
        certificate = compare_file(program, path)
        assert certificate.ok, certificate.verdict
        assert len(certificate.outputs) == 5
        assert certificate.outputs[0].difference.argmax == 1
        assert certificate.dtype == torch.float32 and certificate.inputs[0].startswith("input_ids [")


def test_another_function_is_found(original: ExportedProgram, file: Path) -> None:
    another = spinpass.transform(original, spinpass.RotationConfig(rotations=("R4",)))
    with torch.no_grad():
        another.state_dict["model.layers.1.mlp.down_proj.weight"].neg_()
    certificate = compare_file(another, file)
    assert not certificate.ok and certificate.verdict.startswith("NOT equivalent: ")


def test_other_inputs_and_outputs(original: ExportedProgram, file: Path, tmp_path: Path) -> None:
    prefill = programs.program("llama_tied", "hf", torch.float32)
    with pytest.raises(VerificationError, match=r"takes other inputs \(input_ids, attention_mask\) than model\.onnx"):
        compare_file(prefill, file)

    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x + 1, x + 2

    class One(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x = torch.randn(2, 3)
    path = onnx.export(torch.export.export(Two(), (x,)), tmp_path).path
    assert compare_file(torch.export.export(Two(), (x,)), path).ok
    with pytest.raises(VerificationError, match=r"returns 1 values and model\.onnx 2"):
        compare_file(torch.export.export(One(), (x,)), path)


def test_no_model(original: ExportedProgram, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("hello")
    with pytest.raises(ExportError, match=r"cannot load x\.onnx"):
        compare_file(original, tmp_path / "x.onnx")

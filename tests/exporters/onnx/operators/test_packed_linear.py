"""Packed programs in stock ONNX Runtime: the same logits, every bit width, groups of any columns, small files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ExportError
from spinpass.execution.interpreter import run
from spinpass.exporters.onnx import writer as exporter
from spinpass.quantization import Quantized, quantize
from spinpass.quantization.packed.program import pack, unpack
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made

IDS = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    dynamic = {"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    model = made(Decoder(layers=1, hidden=64, ffn=96, bias=True), dtype=torch.float32)
    return exported(model, dynamic_shapes=dynamic)


def outputs(path: Path) -> Any:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: IDS.numpy()})[0]


def regrouped(quantized: Quantized, name: str, index: Tensor) -> Quantized:
    """The weight with other groups, in the program and in the report."""
    weight = quantized.report.weights[name]
    codes = replace(weight.codes, index=index)
    with torch.no_grad():
        quantized.program.state_dict[name].copy_(codes.dequantized())
    weights = {**quantized.report.weights, name: replace(weight, codes=codes)}
    return replace(quantized, report=replace(quantized.report, weights=weights))


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("w2g16-rtn-asym", 2),
        ("w3g32-rtn", 4),
        ("w3-rtn-asym", 4),
        ("w4g16-rtn-head4", 4),
        ("w4-rtn", 4),
        ("w8g32-rtn-asym", 8),
    ],
)
def test_onnx_runtime_returns_the_logits_of_the_packed_program(
    tmp_path: Path, program: ExportedProgram, scheme: str, bits: int
) -> None:
    quantized = quantize(program, scheme)
    packed = pack(quantized).program
    report = exporter.export(packed, tmp_path, metadata={})
    assert report.certificate is not None and report.certificate.ok
    expected = run(packed, (IDS,))[0].numpy()
    assert np.abs(outputs(report.path) - expected).max() < 2e-5 * np.abs(expected).max()
    model = ir.load(report.path)
    kernels = [n for n in model.graph if n.op_type == "MatMulNBits"]
    assert len(kernels) == len(quantized.report.weights) and {n.attributes["bits"].as_int() for n in kernels} == {bits}
    assert not any(n.op_type == "PackedLinear" for n in model.graph)
    assert not any(v.dtype == ir.DataType.INT32 and len(v.shape or ()) == 2 for v in model.graph.initializers.values())


def test_the_file_is_small(tmp_path: Path) -> None:
    model = made(Decoder(layers=1, hidden=256, ffn=512, heads=4, kv=4, head=64), dtype=torch.float32)
    quantized = quantize(exported(model), "w4g32-rtn")
    packed, simulated = (
        exporter.export(p, tmp_path / n) for p, n in ((pack(quantized).program, "p"), (quantized.program, "s"))
    )
    assert packed.bytes < simulated.bytes / 4


def test_groups_of_any_columns_are_gathered(tmp_path: Path, program: ExportedProgram) -> None:
    index = torch.randperm(64, generator=torch.Generator().manual_seed(5)) // 16
    quantized = regrouped(quantize(program, "w4g16-rtn-asym"), "blocks.0.mlp.up.weight", index)
    packed = pack(quantized).program
    report = exporter.export(packed, tmp_path)
    expected = run(quantized.program, (IDS,))[0].numpy()
    assert np.abs(outputs(report.path) - expected).max() < 2e-5 * np.abs(expected).max()


def test_the_values_are_equal_bit_for_bit(tmp_path: Path) -> None:
    """The identity as input: every product is one weight."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(64, 24, bias=False), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, self.head(y)

    torch.manual_seed(2)
    source = torch.export.export(Single(), (torch.eye(64),))
    for scheme in ("w3g16-rtn-asym", "w4-rtn", "w8g32-rtn"):
        quantized = quantize(source, scheme)
        report = exporter.export(pack(quantized).program, tmp_path / scheme)
        session = ort.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: np.eye(64, dtype=np.float32)})[0]
        assert np.array_equal(found, quantized.program.state_dict["linear.weight"].detach().T.numpy()), scheme


def test_a_rotated_program_keeps_its_hadamards(tmp_path: Path, program: ExportedProgram) -> None:
    rotated = spinpass.transform(program, spinpass.RotationConfig(form="online"))
    packed = pack(quantize(rotated, "w4-rtn")).program
    report = exporter.export(packed, tmp_path)
    assert report.hadamards > 0 and report.certificate is not None and report.certificate.ok


def test_groups_that_the_kernel_cannot_take_are_refused(tmp_path: Path, program: ExportedProgram) -> None:
    name = "blocks.0.mlp.up.weight"
    uneven = torch.arange(64) // 16
    uneven[:3] = 3
    packed = pack(regrouped(quantize(program, "w4g16-rtn"), name, uneven)).program
    with pytest.raises(ExportError, match=r"groups of blocks\.0\.mlp\.up have 13, 16, 19 weights, and MatMulNBits"):
        exporter.export(packed, tmp_path / "a")
    quantized = quantize(program, "w4g16-rtn")
    weight = quantized.report.weights[name]
    eight = replace(weight.codes, scales=weight.codes.scales.repeat(1, 2), zeros=weight.codes.zeros.repeat(1, 2))
    weights = {**quantized.report.weights, name: replace(weight, codes=eight)}
    packed = pack(replace(quantized, report=replace(quantized.report, weights=weights))).program
    with pytest.raises(
        ExportError, match=r"blocks\.0\.mlp\.up have 8 weights; MatMulNBits takes multiples of 16; unpack"
    ):
        exporter.export(packed, tmp_path / "b")
    assert not any(tmp_path.iterdir())
    assert exporter.export(unpack(packed), tmp_path / "c").certificate is not None

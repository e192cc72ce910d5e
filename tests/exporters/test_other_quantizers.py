"""Other people's quantizers take what the pass returns: torchao's PT2E the program, ONNX Runtime's own the file."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor
from torch.export import ExportedProgram

import spinpass
from spinpass import RotationConfig
from spinpass.execution.interpreter import run
from spinpass.exporters.onnx import writer as exporter
from tests.support.decoders import VOCAB, Decoder, exported, made, with_outliers

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


@cache
def program() -> ExportedProgram:
    """With two channels of the stream far above the others."""
    model = with_outliers(made(Decoder(layers=2), dtype=torch.float32))
    return exported(model)


@cache
def rotated() -> ExportedProgram:
    return spinpass.transform(program(), RotationConfig(form="online"))


def distance(found: Tensor) -> float:
    expected = run(program(), (IDS,))[0]
    return float((found - expected).norm() / expected.norm())


def with_pt2e(source: ExportedProgram) -> Tensor:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(source.module(), quantizer)
    prepared(IDS)
    converted = convert_pt2e(prepared)
    names = [str(n.target) for n in converted.graph.nodes]
    assert sum("quantize_per_channel" in n for n in names) == 15, "every linear layer, the head included"
    found: Tensor = converted(IDS)
    return found


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: pip install 'spinpass[torchao]'")
def test_pt2e_takes_a_rotated_program_and_gains() -> None:
    before, after = distance(with_pt2e(program())), distance(with_pt2e(rotated()))
    assert after < 0.8 * before < 0.2


def with_onnxruntime(source: ExportedProgram, folder: Path) -> Tensor:
    report = exporter.export(source, folder)
    path = folder / "quantized.onnx"
    quantize_dynamic(report.path, path, weight_type=QuantType.QUInt8, per_channel=True)
    nodes = onnx.load(path).graph.node
    assert sum(n.op_type == "MatMulInteger" for n in nodes) >= 15
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: IDS.numpy()})[0]))


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_quantizes_a_rotated_file_and_gains(tmp_path: Path) -> None:
    before = distance(with_onnxruntime(program(), tmp_path / "a"))
    after = distance(with_onnxruntime(rotated(), tmp_path / "b"))
    assert after < 0.8 * before < 0.2

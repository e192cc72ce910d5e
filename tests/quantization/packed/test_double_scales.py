"""Packed programs whose scales are eight bits: what they compute, how small they are, and who refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ConfigError, QuantizedWeightError
from spinpass.execution.interpreter import run
from spinpass.exporters.onnx import writer as exporter
from spinpass.quantization import Quantized, quantize
from spinpass.quantization.packed.double_scales import decode_scales, double_quantize_program
from spinpass.quantization.packed.program import pack, unpack
from spinpass.quantization.packed.training import Trainable
from spinpass.quantization.rounding.double import double_quantize
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made

IDS = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return quantize(exported(made(Decoder(layers=1, hidden=64, ffn=96, kv=4), dtype=torch.float32)), "w4g16-rtn-asym")


@pytest.fixture(scope="module")
def packed(quantized: Quantized) -> ExportedProgram:
    return pack(quantized).program


def logits(ep: ExportedProgram) -> Tensor:
    return run(ep, (IDS,))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("mode", "size"), [(1, None), (2, None), (2, 16)])
def test_scales_are_what_their_statistics_say(
    quantized: Quantized, packed: ExportedProgram, mode: int, size: int | None
) -> None:
    result = double_quantize_program(packed, mode=mode, size=size)
    loose = unpack(result)
    for name, weight in quantized.report.weights.items():
        expected = double_quantize(weight.codes, mode=mode, size=size, form="scales")
        assert torch.equal(loose.state_dict[name], expected.dequantized()), name
    assert torch.equal(logits(loose), logits(result))
    off = (logits(result) - logits(packed)).abs().max() / logits(packed).abs().max()
    assert 0 < off < 0.05
    names = {n.rsplit(".", 1)[1] for n in result.state_dict if "mlp.up" in n}
    assert names == {"qweight", "qzeros", "qscales", "qscales_scales", "qscales_zeros"}


def test_it_is_smaller_and_saved_and_loaded(packed: ExportedProgram, tmp_path: Path) -> None:
    result = double_quantize_program(packed, size=32)
    before, after = (sum(t.nbytes for t in p.state_dict.values()) for p in (packed, result))
    assert after < 0.9 * before
    torch.export.save(result, tmp_path / "double.pt2")
    assert torch.equal(logits(torch.export.load(tmp_path / "double.pt2")), logits(result))


def test_who_refuses_it_says_why(packed: ExportedProgram) -> None:
    result = double_quantize_program(packed)
    with pytest.raises(QuantizedWeightError, match="qweight is a quantized or packed weight"):
        spinpass.transform(result)
    with pytest.raises(ConfigError, match=r"the scales of blocks\S+weight are computed in the graph"):
        Trainable(result)
    with pytest.raises(ConfigError, match="no packed linear layer"):
        double_quantize_program(unpack(packed))
    with pytest.raises(ConfigError, match="size 7 does not divide"):
        double_quantize_program(packed, size=7)


def test_scales_become_constants_again_for_training_and_onnx(packed: ExportedProgram, tmp_path: Path) -> None:
    result = double_quantize_program(packed)
    plain = decode_scales(result)
    assert set(plain.state_dict) == set(packed.state_dict) and torch.equal(logits(plain), logits(result))
    assert decode_scales(packed) is packed
    assert torch.equal(Trainable(plain)(IDS), logits(result))
    report = exporter.export(result, tmp_path / "onnx")
    assert report.certificate is not None and report.certificate.ok
    assert sum(n.op_type == "MatMulNBits" for n in ir.load(report.path).graph) == 7
    assert set(unpack(result).state_dict) == set(unpack(packed).state_dict)


def test_layers_that_share_a_weight_share_its_statistics() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.linear(self.linear(x).tanh()).tanh())

    torch.manual_seed(0)
    twice = quantize(torch.export.export(Twice(), (torch.ones(2, 32),)), "w4g16-rtn")
    result = double_quantize_program(pack(twice).program)
    assert sum(n.endswith("qscales") for n in result.state_dict) == 1

"""GPTQ checkpoints into programs that are rotated, packed and exported again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spinpass
from spinpass.errors import ConfigError
from spinpass.execution.interpreter import run
from spinpass.exporters.onnx import writer as onnx
from spinpass.formats.gptq import GptqCheckpoint, read_gptq, write_gptq
from spinpass.loading.dequantize import dequantize_checkpoint, quantized_checkpoint
from spinpass.quantization import QuantizationConfig, Weights, pack, quantize
from spinpass.quantization.rounding.grid import rounded
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made

IDS = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program() -> Any:
    return exported(made(Decoder(layers=1, hidden=32, ffn=64, kv=4, bias=True), dtype=torch.float32))


def test_a_checkpoint_becomes_a_program_that_is_rotated_and_quantized_again(tmp_path: Path, program: Any) -> None:
    quantized = quantize(program, "w4g16-rtn")
    weights = quantized.report.weights
    rest = {name: t for name, t in quantized.program.state_dict.items() if name not in weights}
    write_gptq(tmp_path, weights, tensors=rest, scales_dtype=torch.float32)
    blank = exported(made(Decoder(layers=1, hidden=32, ffn=64, kv=4, bias=True), seed=9, dtype=torch.float32))
    loaded = dequantize_checkpoint(blank, read_gptq(tmp_path))
    expected = run(quantized.program, (IDS,))[0]
    assert torch.equal(run(loaded, (IDS,))[0], expected) and not torch.allclose(run(blank, (IDS,))[0], expected)
    rotated = spinpass.transform(loaded)
    assert torch.allclose(run(rotated, (IDS,))[0], expected, atol=1e-4)
    assert len(quantize(rotated, "w8-rtn").report.weights) == len(weights)


def test_the_integers_of_a_checkpoint_are_packed_and_run_in_onnx_runtime(tmp_path: Path, program: Any) -> None:
    """Half scales and groups of any columns, as other tools write them."""
    quantized = quantize(program, "w4g16-rtn-asym")
    weights = dict(quantized.report.weights)
    name = "blocks.0.mlp.up.weight"
    index = torch.randperm(32, generator=torch.Generator().manual_seed(5)) // 16
    weights[name] = replace(weights[name], codes=replace(weights[name].codes, index=index))
    rest = {n: t for n, t in quantized.program.state_dict.items() if n not in weights}
    write_gptq(tmp_path / "in", weights, tensors=rest, checkpoint_format="gptq_v2")
    checkpoint = read_gptq(tmp_path / "in")
    loaded = quantized_checkpoint(program, checkpoint)
    packed = pack(loaded)
    assert not packed.kept and loaded.report.bytes_after < loaded.report.bytes_before
    expected = run(dequantize_checkpoint(program, checkpoint), (IDS,))[0]
    assert torch.equal(run(packed.program, (IDS,))[0], expected)
    assert loaded.report.weights[name].scheme == Weights(4, 16, symmetric=False, act_order=True)
    report = onnx.export(packed.program, tmp_path / "onnx")
    assert report.certificate is not None and report.certificate.ok
    write_gptq(tmp_path / "out", loaded.report.weights, tensors=rest, checkpoint_format="gptq_v2")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(t, again[n]) for n, t in load_file(tmp_path / "in" / "model.safetensors").items())


def test_a_transposed_constant_is_found_by_its_use() -> None:
    class Transposed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear = torch.nn.Linear(32, 32), torch.nn.Module()
            self.linear.weight = torch.nn.Parameter(normal(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x @ self.linear.weight)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    source = torch.export.export(Transposed(), (normal(2, 32),))
    quantized = quantize(source, QuantizationConfig(Weights(method="rtn"), head=Weights(method="rtn")))
    assert quantized.report.weights["linear.weight"].dim == 0
    codes = {n: w.codes for n, w in quantized.report.weights.items()}
    loaded = dequantize_checkpoint(source, GptqCheckpoint(codes, {}, {}), strict=False)
    for name in codes:
        assert torch.equal(loaded.state_dict[name], quantized.program.state_dict[name])


def test_what_does_not_belong_to_the_program_is_refused(program: Any) -> None:
    codes = rounded(normal(64, 32), Weights(method="rtn"))
    name = "blocks.0.mlp.up.weight"
    with pytest.raises(ConfigError, match=r"has x\.weight, which the program has not"):
        dequantize_checkpoint(program, GptqCheckpoint({"x.weight": codes}, {}, {}), strict=False)
    with pytest.raises(ConfigError, match=r"up\.weight is \[8, 32\] in the checkpoint and \[64, 32\]"):
        wrong = {name: rounded(normal(8, 32), Weights(method="rtn"))}
        dequantize_checkpoint(program, GptqCheckpoint(wrong, {}, {}), strict=False)
    with pytest.raises(ConfigError, match=r"the checkpoint has no \S+; give strict=False"):
        dequantize_checkpoint(program, GptqCheckpoint({name: codes}, {}, {}))
    zero = {"no.such.bias": torch.zeros(4)}
    loaded = dequantize_checkpoint(program, GptqCheckpoint({name: codes}, zero, {}), strict=False)
    assert torch.equal(loaded.state_dict[name], codes.dequantized())


def test_a_tied_table_takes_one_value() -> None:
    tied = exported(made(Decoder(layers=1, tied=True), dtype=torch.float32))
    table = normal(*tied.state_dict["embed.weight"].shape)
    one = dequantize_checkpoint(tied, GptqCheckpoint({}, {"embed.weight": table}, {}), strict=False)
    assert torch.equal(one.state_dict["head.weight"], table)
    two = GptqCheckpoint({}, {"embed.weight": table, "head.weight": table + 1}, {})
    with pytest.raises(ConfigError, match=r"head\.weight shares its constant"):
        dequantize_checkpoint(tied, two, strict=False)

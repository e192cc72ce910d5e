"""Quantized KV caches: what the kernel stores and attends to is what a simulation in torch computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter

import spinpass
from spinpass.errors import ConfigError, ExportError
from spinpass.exporters.onnx import writer as exporter
from spinpass.exporters.onnx.integers.cache import quantize_cache
from spinpass.runtime.decoder import OrtDecoder
from spinpass.runtime.onnx_graph import DecoderGraph
from tests.support import models

TEXTS = [[5, 9, 17, 4, 33, 12, 71, 8], [22, 60, 3, 90, 14, 41]]
IDS = torch.tensor([[40, 7, 19, 88, 55, 23]])


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return spinpass.transform(models.export_hf_cache(models.build("llama")), spinpass.RotationConfig(form="online"))


@pytest.fixture(scope="module")
def fused(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporter.export(program, tmp_path_factory.mktemp("fused"), fuse=True).path


def scales(path: Path) -> list[Tensor]:
    """Of keys and values, layer by layer, each (1, heads, 1, size)."""
    nodes = [node for node in ir.load(path).graph if node.op_type == "GroupQueryAttention"]
    arrays = [node.inputs[i].const_value.numpy() for node in nodes for i in (12, 13)]  # type: ignore[union-attr]
    return [torch.from_numpy(array.copy()).view(1, models.KV, 1, models.HEAD_DIM) for array in arrays]


def rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The simulation: q·s with q in −2^(bits−1) … 2^(bits−1) − 1."""
    return (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def values(stored: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What the integers of a cache stand for."""
    if bits == 8:
        return stored * scale
    low, high = (stored & 15).int() - 8, (stored >> 4).int() - 8
    return torch.stack([low, high], -1).flatten(-2) * scale


class Simulated(Interpreter):
    """A program that attends to rounded keys and values: what is appended to a cache is rounded first."""

    def __init__(self, program: ExportedProgram, scale: Sequence[Tensor], bits: int) -> None:
        super().__init__(program.graph_module)
        self.scale, self.bits = iter(scale), bits

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.cat.default and args[0][0].ndim == 4 and args[0][0].shape[2] == 0:
            args = ([args[0][0], rounded(args[0][1], next(self.scale), self.bits)], *args[1:])
        return super().call_function(target, args, kwargs)


def simulate(program: ExportedProgram, scale: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Logits and caches for IDS from an empty cache."""
    from spinpass.execution.interpreter import constants, user_input_names

    known = {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1])[None]}
    empty = torch.zeros(1, models.KV, 0, models.HEAD_DIM)
    given = constants(program) | {name: known.get(name, empty) for name in user_input_names(program)}
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        return list(Simulated(program, scale, bits).run(*(given[name] for name in placeholders)))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_kernel_computes_what_is_simulated(
    program: ExportedProgram, fused: Path, tmp_path: Path, bits: int
) -> None:
    report = quantize_cache(fused, tmp_path, bits, TEXTS)
    assert report.attention == 2 and report.bytes_after * 32 == report.bytes_before * bits
    graph, scale = DecoderGraph.open(report.path), scales(report.path)
    state = graph.start(1)
    logits = graph.step(IDS, state)
    expected, *caches = simulate(program, scale, bits)
    for name, want, s in zip(state.cache, caches, scale, strict=True):
        found = graph.held(state)[name]
        assert found.dtype == (torch.int8 if bits == 8 else torch.uint8)
        torch.testing.assert_close(values(found, s, bits), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_scales_are_the_largest_values_of_the_texts(fused: Path, tmp_path: Path) -> None:
    graph = DecoderGraph.open(fused)
    peaks = []
    for text in TEXTS:
        state = graph.start(1)
        graph.step(torch.tensor([text]), state)
        peaks.append(graph.held(state)[graph.cache[0].name].abs().amax((0, 2), keepdim=True))
    found = scales(quantize_cache(fused, tmp_path, 8, TEXTS).path)[0]
    torch.testing.assert_close(found, torch.maximum(*peaks) / 127)


def test_decoding_on_integers_follows_the_float_model(fused: Path, tmp_path: Path) -> None:
    """Eight bits of a tiny model change little; the cache of the single-token steps is that of the prompt."""
    ids = [*TEXTS[0], *TEXTS[1]]
    decoder = OrtDecoder(quantize_cache(fused, tmp_path, 8, TEXTS).path)
    plain, stored = OrtDecoder(fused).logits(ids), decoder.logits(ids)
    assert (plain - stored).abs().max() < 0.1 * plain.abs().max()
    tokens = decoder.generate(ids, 3).tokens
    whole = decoder.logits([*ids, *tokens[:2]])
    assert [int(row.argmax()) for row in whole[-3:]] == list(tokens)


def test_what_cannot_be_quantized(program: ExportedProgram, fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a KV cache of 2 bits: choose 4 or 8"):
        quantize_cache(fused, tmp_path / "a", 2, TEXTS)
    with pytest.raises(ConfigError, match="need calibration tokens"):
        quantize_cache(fused, tmp_path / "a", 8, [[]])
    plain = exporter.export(program, tmp_path / "plain.onnx").path
    with pytest.raises(ExportError, match=rf"its cache {models.cache_argument()}_0 is not read by GroupQueryAttention"):
        quantize_cache(plain, tmp_path / "a", 8, TEXTS)
    stored = quantize_cache(fused, tmp_path / "stored", 8, TEXTS).path
    with pytest.raises(ExportError, match=rf"its cache {models.cache_argument()}_0 is of type INT8"):
        quantize_cache(stored, tmp_path / "a", 8, TEXTS)
    assert not (tmp_path / "a").exists()

"""Tokens with massive values keep eight bits where four meet them, in the graph and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.execution import execute, flat_inputs, run
from spinpass.exporters.onnx import export
from spinpass.learning import Learning
from spinpass.operators import round_tokens
from spinpass.quantization import Activations, Cache, QuantizationConfig, learned, quantize
from spinpass.runtime import OrtDecoder  # noqa: F401  (the package is there)
from tests.support.decoders import Decoder, made
from tests.support.quantizable import export as exported
from tests.support.quantizable import inputs

MASSIVE = 3  # the token id whose embedding is far above the others


def program() -> torch.export.ExportedProgram:
    """One unit of each MLP answers to one token alone, and much: what makes a massive token in language models."""
    model = made(Decoder(layers=2), dtype=torch.float32)
    with torch.no_grad():
        model.embed.weight[MASSIVE] *= 8
        toward = model.embed.weight[MASSIVE] / model.embed.weight[MASSIVE].norm()
        for block in model.blocks:
            for linear in (block.mlp.up, block.mlp.gate):
                linear.weight[0] = 12 * toward
    return exported(model)


def shown(count: int = 3) -> list[tuple[Tensor]]:
    found = inputs(count)
    for (ids,) in found:
        ids[ids == MASSIVE] = 4
        ids[:, 0] = MASSIVE
    return found


def test_tokens_above_the_limit_have_eight_bits_and_others_four() -> None:
    quantized = quantize(program(), QuantizationConfig(None, Activations(4, clip=1.0, massive=8.0)), shown())
    seen: dict[str, Any] = {}

    def watch(node: Any, value: Any) -> Any:
        seen[node.name] = value
        return value

    execute(quantized.program, flat_inputs(quantized.program, shown()[0]), watch=watch)
    nodes = {node.name: node for node in quantized.program.graph.nodes}
    selected = [nodes[name] for name in quantized.report.activations]
    told = 0
    assert len(selected) == len(quantized.report.activations) > 4
    for node in selected:
        near, few, exact = node.args
        x = seen[few.args[0].name]
        peak = x.abs().amax(-1, keepdim=True)
        limit = near.args[1]
        wanted = torch.where(peak <= limit, round_tokens(x, 4, False), round_tokens(x, 8, False))
        assert torch.equal(seen[node.name], wanted) and torch.equal(seen[exact.name], round_tokens(x, 8, False))
        told += int((peak > limit).sum())
        assert float((peak > limit).float().mean()) < 0.5
    assert told, "the massive token is one"


def test_it_lowers_the_error_where_there_are_some() -> None:
    source, given = program(), shown(4)

    def error(scheme: str) -> float:
        after = quantize(source, scheme, given[:2]).program
        pairs = [(run(source, x)[0], run(after, x)[0]) for x in given[2:]]
        return sum(float((a - b).square().sum()) for a, b in pairs)

    assert error("a4-kv4-sinks") < error("a4-kv4")


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    quantized = quantize(program(), "w4g16-rtn-a4-kv4-sinks", shown())
    report = export(quantized.program, tmp_path / "model.onnx", verify=True)
    assert report.certificate is not None and report.certificate.ok


def test_what_is_learned_passes_through_it() -> None:
    source = program()
    quantized = quantize(source, "w4g16-rtn-a4-kv4-sinks", shown())
    found = learned(source, quantized, shown(9), Learning(("scales", "clips"), rounds=2, rate=5))
    assert found.report.learning is not None and found.report.learning.after <= found.report.learning.before


def test_a_scheme_says_so() -> None:
    config = QuantizationConfig.parse("w4-rtn-a4-kv4-sinks")
    assert config.activations == Activations(4, massive=8.0) and config.cache == Cache(4, massive=8.0)
    assert config.needs_calibration and not QuantizationConfig.parse("w4-rtn-a4-kv4").needs_calibration
    assert QuantizationConfig.parse("w4-a8-kv4-sinks").activations == Activations(8)
    for wrong in ("w4-sinks", "w4-a8-sinks", "w4-a4static-sinks"):
        with pytest.raises(ConfigError, match="'sinks' in .* is of a4 and kv4"):
            QuantizationConfig.parse(wrong)
    for given in ({"massive": 0.5}, {"massive": 8.0, "bits": 8}, {"massive": 8.0, "static": True}):
        with pytest.raises(ConfigError, match="massive"):
            Activations(**{"bits": 4} | given)

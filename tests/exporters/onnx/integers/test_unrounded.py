"""The copy of a file whose operators round nothing as they run, and what it says of the scales of a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from spinpass.errors import VerificationError
from spinpass.exporters.onnx import (
    KernelRounding,
    check_cache,
    export,
    kernel_rounding,
    quantize_4bit,
    quantize_cache,
    unrounded_copy,
)
from spinpass.runtime.onnx_graph import DecoderGraph
from tests.support import models

TEXTS = [[5, 9, 17, 4, 33, 12, 71, 8], [22, 60, 3, 90, 14, 41]]
IDS = torch.tensor([[40, 7, 19, 88, 55, 23]])


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(models.export_hf_cache(models.build("llama")), tmp_path_factory.mktemp("fused"), fuse=True).path


def logits(file: Path) -> torch.Tensor:
    graph = DecoderGraph.open(file)
    return graph.step(IDS, graph.start(1))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_of_integers_becomes_one_of_floats(fused: Path, tmp_path: Path, bits: int) -> None:
    stored = quantize_cache(fused, tmp_path / "stored", bits, TEXTS).path
    copy = unrounded_copy(stored, stored.with_name("copy.onnx"))
    assert kernel_rounding(stored) == KernelRounding(0, 2) and not kernel_rounding(copy)
    assert not torch.equal(logits(stored), logits(fused)) and torch.equal(logits(copy), logits(fused))
    check_cache(stored, copy, TEXTS)


def test_products_round_no_activations(fused: Path, tmp_path: Path) -> None:
    packed, exact = (quantize_4bit(fused, tmp_path / name, accuracy_level=level).path for name, level in (("a", 4), ("b", 0)))
    copy = unrounded_copy(packed, packed.with_name("copy.onnx"))
    assert kernel_rounding(packed).products and not kernel_rounding(copy)
    assert not torch.equal(logits(packed), logits(exact)) and torch.equal(logits(copy), logits(exact))


def turned(array: Any) -> Any:
    return array[::-1].copy()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a * np.float32(8), id="coarse"),
        pytest.param(lambda a: a * np.float32(0.5), id="clips"),
        pytest.param(turned, id="other channels"),
        pytest.param(lambda a: a * np.float32("nan"), id="not a number"),
        pytest.param(lambda a: a[1:].copy(), id="too few"),
    ],
)
def test_scales_of_other_values_are_seen(fused: Path, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    stored = quantize_cache(fused, tmp_path, 8, TEXTS).path
    copy = unrounded_copy(stored, stored.with_name("copy.onnx"))
    model = onnx.load(stored)
    name = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention").input[13]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    onnx.save(model, stored)
    with pytest.raises(VerificationError, match="scales that the file has for (past|cache)"):
        check_cache(stored, copy, TEXTS)


def test_a_copy_elsewhere_would_lose_its_data(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beside"):
        unrounded_copy(fused, tmp_path / "copy.onnx")

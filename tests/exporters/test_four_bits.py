"""The quantizer for transformers' OnnxConfig: integers in the file, run in ONNX Runtime beside what they stand for."""

from __future__ import annotations

import collections
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spinpass
from spinpass.errors import ConfigError, ExportError
from tests.support import models

exporters = pytest.importorskip("transformers.exporters")
pytest.importorskip("onnxruntime")

from spinpass.exporters import transformers as rotated  # noqa: E402
from spinpass.exporters.transformers.caches import cache_argument  # noqa: E402
from spinpass.exporters.transformers.four_bits import KeptCodes  # noqa: E402
from spinpass.exporters.transformers.generation import _empty_cache, _inputs, generate_exported  # noqa: E402

SIZES = dict(num_hidden_layers=1, hidden_size=64, intermediate_size=128)
PROMPTS = ([5, 17, 3, 80], [44])
CONFIG = spinpass.RotationConfig(form="online", verify=False)


def model() -> Any:
    return models.build("llama_tied", **SIZES).requires_grad_(False)


def sample(seed: int = 1) -> dict[str, Any]:
    return dict(models.sample_inputs(mask=False, seed=seed))


def counts(program: Any) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in program.graph)


def integers(program: Any) -> dict[str, Any]:
    """The constants behind products and lookups on integers, by name."""
    found = {value for node in program.graph if node.op_type == "MatMulNBits" for value in node.inputs[1:3]}
    return {str(v.name): v.const_value.numpy() for v in found if v is not None and v.const_value is not None}


class Watching(rotated.RotatedOnnxExporter):
    """Keeps the rounded program of every component, of which the exporter keeps the last."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.rounded: list[Any] = []

    def lowered(self, program: Any) -> Any:
        made = super().lowered(program)
        self.rounded.append(self.rounded_program())
        return made


@pytest.fixture(scope="module")
def generation() -> tuple[Watching, Any]:
    """Weights alone are rounded, so that the file computes what the program does."""
    exporter = Watching()
    quantizer = rotated.MatMulNBitsQuantizer("w4g32-gptq-head8-embed8", [sample(seed) for seed in range(2, 6)])
    config = exporters.OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*calibrates on a single sample.*")
        return exporter, exporter.export_for_generation(model(), sample(), config)


def test_prefill_and_decode_hold_the_same_integers(generation: tuple[Watching, Any]) -> None:
    exporter, exported = generation
    prefill, decode = (exported.components[name].program for name in ("prefill", "decode"))
    for program in (prefill, decode):
        found = counts(program)
        assert found["MatMulNBits"] == 5 and not found["MatMul"], "of q, k, v one, of gate and up one, and the head"
        assert found["GatherBlockQuantized"] == 1 and found["GroupQueryAttention"] == 1
        levels = {node.attributes.get("accuracy_level") for node in program.graph if node.op_type == "MatMulNBits"}
        assert levels == {None}
    first, second = integers(prefill), integers(decode)
    assert first.keys() == second.keys() and len(first) == 5
    for name, array in first.items():
        assert np.array_equal(array, second[name]), name
    assert {weight.scheme.method for weight in exporter.rounded_program().weights.values()} == {"gptq", "rtn"}


def test_it_computes_what_the_rounded_program_does(generation: tuple[Watching, Any]) -> None:
    exporter, exported = generation
    metadata, ids = exported.components["prefill"].metadata, PROMPTS[0]

    def given() -> dict[str, Any]:
        cache = {cache_argument(exported.components["decode"].metadata): _empty_cache(exported.config)}
        return dict(_inputs(metadata, ids, len(ids), cache))

    found: Tensor = exported.runners["prefill"](**given()).logits
    simulated = exporter.rounded[0].program.module()(**given())["logits"]
    exact = model()(torch.tensor([ids])).logits
    torch.testing.assert_close(found, simulated, rtol=0, atol=1e-4)
    assert 0.01 < float((found - exact).norm() / exact.norm()) < 0.3, "of four bits"


def test_it_generates_from_what_was_saved(generation: tuple[Watching, Any], tmp_path: Path) -> None:
    _, exported = generation
    exported.save_pretrained(tmp_path)
    loaded = exporters.ExportedModel.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        tokens = generate_exported(loaded, prompt, 8)
        assert tokens == generate_exported(exported, prompt, 8) and len(tokens) == 8
        whole = model()(torch.tensor([[*prompt, *tokens]])).logits[0]
        scores = whole[len(prompt) - 1 : -1]
        lost = scores.amax(1) - scores.gather(1, torch.tensor([tokens]).T)[:, 0]
        assert float(lost.max()) < 0.2 * float(whole.abs().max()), "the floats would take these tokens, or nearly"


def test_transformers_own_exporter_rounds_to_nearest() -> None:
    given = sample() | {"use_cache": False}
    expected = model()(**given).logits
    config = exporters.OnnxConfig(dynamic=True, quantizer=rotated.MatMulNBitsQuantizer())
    exported = exporters.OnnxExporter().export(model(), dict(given), config)
    found = counts(exported.program)
    assert found["MatMulNBits"] == 8 and found["GatherBlockQuantized"] == 1
    assert {
        (node.attributes["bits"].as_int(), node.attributes["accuracy_level"].as_int())
        for node in exported.program.graph
        if node.op_type == "MatMulNBits"
    } == {(4, 4), (8, 4)}
    logits = exported(input_ids=given["input_ids"]).logits
    assert 0.01 < float((logits - expected).norm() / expected.norm()) < 0.3


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("a8", "a8 has no weights"),
        ("w4g32-rtn-a4", "has activations of another kind than a8"),
        ("w4g32-rtn-a8static", "has activations of another kind than a8"),
        ("w4g32-rtn-a8asym", "has activations of another kind than a8"),
        ("w4g32-rtn-kv8", "has a cache"),
        ("w3.5g64", "has widths that differ"),
        ("w4g32-distill", "has learning"),
        ("w4g33", "group_size 33 is not one of"),
        ("x4", "x4"),
    ],
)
def test_schemes_that_are_none_of_products_with_weights(scheme: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        rotated.MatMulNBitsQuantizer(scheme)


@pytest.mark.parametrize(
    ("scheme", "asked"),
    [
        ("w4g32-gptq", "gptq"),
        ("w3g32-rtn", "w3"),
        ("w4-rtn", "no groups"),
        ("w4g32-rtn-bf16", "bf16"),
        ("w4g32-rtn-head8g64", "head8g64"),
        ("w4g32-rtn-embed2", "embed2"),
    ],
)
def test_schemes_that_take_a_program_are_refused_before_the_trace(scheme: str, asked: str) -> None:
    config = exporters.OnnxConfig(quantizer=rotated.MatMulNBitsQuantizer(scheme))

    class Untraceable(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            raise AssertionError("it was traced")

    with pytest.raises(ConfigError, match=f"{scheme} has {asked}, which takes a program, .*: use RotatedOnnxExporter"):
        exporters.OnnxExporter().export(Untraceable(), sample(), config)


def test_a_format_that_has_no_such_product() -> None:
    quantizer = rotated.MatMulNBitsQuantizer()
    with pytest.raises(ValueError, match="MatMulNBitsQuantizer quantizes onnx exports, not openvino ones"):
        quantizer.validate_environment(exporters.OpenVINOConfig().export_format)
    with pytest.raises(ExportError, match="no program was rounded: export with a MatMulNBitsQuantizer"):
        rotated.RotatedOnnxExporter().rounded_program()


def test_codes_are_those_of_the_first_component_where_weights_are_the_same() -> None:
    from spinpass.quantization import Codes, QuantizedWeight, Weights

    kept, scheme = KeptCodes(), Weights(4, 32, method="rtn")
    codes = Codes(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), 4, True)
    weight = QuantizedWeight(codes, 1, scheme, 0.0)

    class Program:
        def __init__(self, value: float) -> None:
            self.state_dict = {"w": torch.tensor([value])}

    first: Any = kept.of(Program(1.0))  # type: ignore[arg-type]
    assert first.get("w", scheme) is None and first.put("w", weight) is weight
    assert kept.of(Program(1.0)).get("w", scheme) is weight  # type: ignore[arg-type]
    assert kept.of(Program(1.0)).get("w", Weights(8, 32, method="rtn")) is None  # type: ignore[arg-type]
    assert kept.of(Program(2.0)).get("w", scheme) is None  # type: ignore[arg-type]

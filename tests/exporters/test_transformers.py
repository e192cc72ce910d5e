"""transformers' own exporters with a rotation in between: the same tokens, the same fusions, the same files."""

from __future__ import annotations

import collections
import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spinpass
from spinpass import record
from spinpass.errors import ConfigError, ExportError
from spinpass.graph import op_name
from spinpass.operators import hadamard as library
from spinpass.rotations.rotation import Rotation
from tests.support import models

exporters = pytest.importorskip("transformers.exporters")
pytest.importorskip("onnxruntime")

from spinpass.exporters import transformers as rotated  # noqa: E402
from spinpass.exporters.transformers.caches import RotatedComponent, check_caches  # noqa: E402
from spinpass.exporters.transformers.generation import generate_exported  # noqa: E402
from spinpass.exporters.transformers.quantizers import RotatedSamples  # noqa: E402

CONFIG = spinpass.RotationConfig(kind="random-hadamard", form="online", verify=False)
PROMPTS = ([5, 17, 3, 80], [44], list(range(10, 30)))
NEW = 12


def inputs() -> dict[str, Any]:
    return dict(models.sample_inputs(mask=False))


def greedy(prompt: list[int]) -> list[int]:
    """What transformers itself generates."""
    model: Any = models.build("llama")
    return model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[
        0, len(prompt) :
    ].tolist()  # type: ignore[no-any-return]


def counts(model: Any) -> collections.Counter[str]:
    return collections.Counter(node.op_type.split("_")[0] for node in model.graph.all_nodes())


@pytest.fixture(scope="module")
def onnx() -> Any:
    exporter = rotated.RotatedOnnxExporter(rotation=CONFIG)
    return exporter.export_for_generation(
        models.build("llama"), inputs(), exporters.OnnxConfig(dynamic=True, ort_fusions="cpu")
    )


@pytest.fixture(scope="module")
def dynamo() -> tuple[Any, Any]:
    exporter = rotated.RotatedDynamoExporter(rotation=CONFIG)
    return exporter, exporter.export_for_generation(
        models.build("llama"), inputs(), exporters.DynamoConfig(dynamic=True)
    )


def test_fusions_match_around_the_hadamards(onnx: Any) -> None:
    for name in ("prefill", "decode"):
        found = counts(onnx.components[name].program)
        assert found["GroupQueryAttention"] == models.LAYERS and not found["Softmax"], name
        assert found["SkipSimplifiedLayerNormalization"] == 2 * models.LAYERS
        assert found["RotaryEmbedding"] == 2 * models.LAYERS, "outside of the attention, a Hadamard between them"


def test_what_is_saved_loads_without_spinpass_and_generates_the_same(onnx: Any, tmp_path: Path) -> None:
    onnx.save_pretrained(tmp_path)
    loaded = exporters.ExportedModel.from_pretrained(tmp_path)
    assert loaded.components["decode"].metadata.packages["spinpass"]
    for prompt in PROMPTS:
        assert generate_exported(loaded, prompt, NEW) == greedy(prompt)
    script = (
        "import sys; from transformers.exporters import ExportedModel; "
        f"ExportedModel.from_pretrained({str(tmp_path)!r}); print([m for m in sys.modules if m.split('.')[0] == 'spinpass'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_programs_share_a_cache_in_the_rotated_basis(dynamo: tuple[Any, Any]) -> None:
    exporter, exported = dynamo
    prefill, decode = (exported.components[name].program for name in ("prefill", "decode"))
    assert exporter.records == [record.read(prefill), record.read(decode)]
    returned, taken = exporter.records[0].outputs.values(), exporter.records[1].inputs.values()
    assert [(c.space, c.rotation.fingerprint()) for c in returned] == [
        (c.space, c.rotation.fingerprint()) for c in taken
    ]
    assert len(taken) == 2 * models.LAYERS
    assert [component.takes_cache for component in exporter._components] == [False, True]  # prefill: an empty one
    assert [component.returns_cache for component in exporter._components] == [True, True]
    assert library.HADAMARD in map(op_name, prefill.graph.nodes)
    for prompt in PROMPTS:
        assert generate_exported(exported, prompt, NEW) == greedy(prompt)
    plain = exporters.DynamoExporter().export_for_generation(
        models.build("llama"), inputs(), exporters.DynamoConfig(dynamic=True)
    )
    mixed = copy.copy(exported)
    mixed.components, mixed._runners = exported.components | {"prefill": plain.components["prefill"]}, None
    assert generate_exported(mixed, PROMPTS[2], NEW) != greedy(PROMPTS[2]), "a plain cache in a rotated decode must show"


def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    exporter = rotated.RotatedOpenVINOExporter(rotation=CONFIG)
    config = exporters.OpenVINOConfig(dynamic=True, stateful=False)
    exported = exporter.export_for_generation(models.build("llama"), inputs(), config)
    exported.save_pretrained(tmp_path)
    loaded = exporters.ExportedModel.from_pretrained(tmp_path, config={"INFERENCE_PRECISION_HINT": "f32"})
    for prompt in PROMPTS:
        assert generate_exported(loaded, prompt, NEW) == greedy(prompt)


def test_executorch(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model, sample = models.build("llama"), inputs() | {"use_cache": False}
    expected = model(**sample).logits
    exported = rotated.RotatedExecutorchExporter(rotation=CONFIG).export(
        model, dict(sample), exporters.ExecutorchConfig()
    )
    exported.save_pretrained(tmp_path)
    logits = exporters.ExportedModel.from_pretrained(tmp_path)(input_ids=sample["input_ids"]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_one_graph(tmp_path: Path) -> None:
    model, sample = models.build("qwen2"), inputs() | {"use_cache": False}
    expected = model(**sample).logits
    exported = rotated.RotatedOnnxExporter().export(model, dict(sample), {"dynamic": True})
    assert counts(exported.program)["Hadamard"]
    torch.testing.assert_close(exported(input_ids=sample["input_ids"]).logits, expected, rtol=0, atol=1e-4)


def test_the_quantizer_of_the_converted_model_runs_behind_the_rotation() -> None:
    seen: list[Any] = []

    class Watching(exporters.OnnxRuntimeQuantizer):  # type: ignore[misc]
        def quantize(self, model: Any, sample_inputs: Any, export_format: Any) -> Any:
            seen.append([node.op_type for node in model.graph.all_nodes() if node.domain == "spinpass"])
            assert set(seen[-1]) <= {name for _, name, _ in model.functions}
            return super().quantize(model, sample_inputs, export_format)

    quantizer = Watching(exporters.OnnxRuntimeDynamicConfig())
    model, sample = models.build("llama"), inputs() | {"use_cache": False}
    expected = model(**sample).logits
    config = exporters.OnnxConfig(dynamic=True, quantizer=quantizer)
    exported = rotated.RotatedOnnxExporter(rotation=CONFIG).export(model, dict(sample), config)
    assert len(seen) == 1 and seen[0]
    assert counts(exported.program)["MatMulInteger"] and counts(exported.program)["Hadamard"]
    logits = exported(input_ids=sample["input_ids"]).logits
    assert 0 < (logits - expected).abs().max() < 0.2 * expected.abs().max()


def test_calibration_samples_get_the_cache_of_the_rotated_program(dynamo: tuple[Any, Any]) -> None:
    """The rotated program on rotated samples returns what the plain program returns on plain ones."""
    from transformers import DynamicCache

    exporter, _ = dynamo
    program = exporter.rotated_program()  # decode, the last of the two
    cache = DynamicCache(config=models.build("llama").config)
    for layer in range(models.LAYERS):
        cache.update(torch.randn(1, models.KV, 3, 16), torch.randn(1, models.KV, 3, 16), layer)
    sample = {
        models.cache_argument(): cache,
        "input_ids": torch.tensor([[7]]),
        "position_ids": torch.tensor([[3]]),
        "other": 1,
    }
    before = cache.layers[0].keys.clone()
    (made,) = RotatedSamples([sample], lambda: program)
    assert torch.equal(cache.layers[0].keys, before)
    model: Any = models.build("llama")
    taken = ("input_ids", "position_ids", models.cache_argument())
    expected = model(**{name: copy.deepcopy(sample[name]) for name in taken}).logits
    traced = {name: made[name] for name in taken}
    torch.testing.assert_close(program.module()(**traced).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(
        ExportError, match="a calibration sample lacks position_ids; the program takes input_ids, position_ids"
    ):
        list(RotatedSamples([{"input_ids": sample["input_ids"]}], lambda: program))


def test_a_quantizer_of_the_graph_is_refused() -> None:
    class OnTheGraph(exporters.ExportQuantizer):  # type: ignore[misc]
        quantizes_fx_graph = True
        supported_formats = ("dynamo", "onnx")

        def quantize(self, *arguments: Any) -> Any:
            raise AssertionError("not reached")

    for exporter, config in (
        (rotated.RotatedDynamoExporter(), exporters.DynamoConfig(quantizer=OnTheGraph())),
        (rotated.RotatedOnnxExporter(), exporters.OnnxConfig(quantizer=OnTheGraph())),
    ):
        with pytest.raises(ExportError, match="OnTheGraph quantizes the traced graph before it can be rotated"):
            exporter.export(models.build("llama"), inputs(), config)


def test_components_that_disagree_about_the_cache() -> None:
    def component(space: str | None, **which: bool) -> RotatedComponent:
        carried = record.Carried(Rotation.create("hadamard", 16, identity="k"), -1, space) if space else None
        found = record.Record("0", {"k": carried} if carried else {}, {1: carried} if carried else {})
        return RotatedComponent(found, **which)  # type: ignore[arg-type]

    prefill = component("R3:a", takes_cache=False, returns_cache=True)
    both = {"takes_cache": True, "returns_cache": True}
    check_caches({"prefill": prefill, "head": component(None, takes_cache=False, returns_cache=False)})
    check_caches({"prefill": prefill, "decode": component("R3:a", **both)})
    with pytest.raises(
        ExportError, match='prefill returns is not in the basis of the one that decode takes: R3:a .*cache="plain"'
    ):
        check_caches({"prefill": prefill, "decode": component(None, **both)})


def test_registered_exporters_are_found_by_the_auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.exporters import auto

    monkeypatch.setattr(auto, "EXPORT_BACKENDS", dict(auto.EXPORT_BACKENDS))
    runner = auto.get_runner_class("onnx")
    rotated.register("onnx")
    made = exporters.AutoHfExporter.from_config(exporters.OnnxConfig(), rotation=CONFIG)
    assert type(made) is rotated.RotatedOnnxExporter and made.rotation is CONFIG
    assert auto.get_runner_class("onnx") is runner
    with pytest.raises(ExportError, match="there is no export format 'tflite'; there are dynamo, onnx"):
        rotated.register("tflite")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="rotation is a dict, not a spinpass.RotationConfig"):
        rotated.RotatedDynamoExporter(rotation={"kind": "hadamard"})
    with pytest.raises(AttributeError, match="has no attribute 'RotatedTfliteExporter'"):
        rotated.RotatedTfliteExporter  # noqa: B018
    with pytest.raises(ExportError, match="nothing was exported yet"):
        rotated.RotatedDynamoExporter().rotated_program()
    monkeypatch.setattr(rotated.RotatedExecutorchExporter, "required_packages", ["torch", "no_such_package"])
    with pytest.raises(ExportError, match=r"no_such_package.*pip install 'spinpass\[executorch\]'"):
        rotated.RotatedExecutorchExporter()
    for name in [name for name in sys.modules if name.startswith("spinpass.exporters.transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_dynamo", None)
    with pytest.raises(ExportError, match=r"RotatedDynamoExporter needs transformers 5 .*'spinpass\[transformers\]'"):
        rotated.RotatedDynamoExporter  # noqa: B018


def test_generation_checks_what_it_is_given(onnx: Any) -> None:
    with pytest.raises(ConfigError, match="nothing to generate from 0 tokens up to 4 new ones"):
        generate_exported(onnx, [], 4)
    part = exporters.ExportedModel({"model": onnx.components["prefill"]}, "onnx")
    with pytest.raises(ConfigError, match="the exported model has the components model and not"):
        generate_exported(part, [1], 4)
    told = onnx.components["decode"].metadata
    told = dataclasses.replace(told, kwargs={name: kind for name, kind in told.kwargs.items() if "container" not in kind})
    bare = exporters.ExportedModel(onnx.components | {"decode": SimpleNamespace(metadata=told)}, "onnx")
    with pytest.raises(ConfigError, match="the component decode takes no cache"):
        generate_exported(bare, [1], 4)
    assert generate_exported(onnx, [5, 17], 3, end=generate_exported(onnx, [5, 17], 1)) == generate_exported(onnx, [5, 17], 1)

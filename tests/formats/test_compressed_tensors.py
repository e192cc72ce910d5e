"""Checkpoints of compressed-tensors: the tensors and the JSON as that package has them, there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spinpass.errors import ConfigError, ExportError
from spinpass.formats import read_compressed_tensors, resolved_transforms, transform_config, write_compressed_tensors
from spinpass.formats.transform_config import declared_transforms
from spinpass.graph import values_of
from spinpass.passes import OnlineTransform, TransformLocation
from spinpass.quantization import Weights
from spinpass.quantization.report import QuantizedWeight
from spinpass.quantization.rounding.grid import rounded
from spinpass.rotations import Rotation, hadamard

Places = dict[TransformLocation, dict[str, tuple[str, int]]]
PLACES: Places = {
    "input": {f"layers.{i}.down": ("Linear", 32) for i in (0, 1)},
    "q_attn": {"layers.0.attn": ("Attention", 12)},
    "k_cache": {"layers.0.attn": ("Attention", 12)},
}


def weight(bits: int, group: int | None, symmetric: bool) -> QuantizedWeight:
    values = torch.randn(36, 64, generator=torch.Generator().manual_seed(bits))
    scheme = Weights(bits, group, symmetric, "rtn")
    return QuantizedWeight(rounded(values, scheme), 1, scheme, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_round_trip_keeps_every_value(tmp_path: Path, bits: int, group: int | None, symmetric: bool) -> None:
    given = weight(bits, group, symmetric)
    report = write_compressed_tensors(tmp_path, {"a.b.weight": given}, tensors={"norm.weight": torch.ones(3)})
    assert not report.changed and report.bytes == sum(f.stat().st_size for f in report.files)
    back = read_compressed_tensors(tmp_path)
    assert list(back.tensors) == ["norm.weight"] and not back.transforms
    assert torch.equal(back.codes["a.b.weight"].dequantized(), given.codes.dequantized())
    (group_0,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group_0["targets"] == ["a.b"] and group_0["weights"]["num_bits"] == bits
    assert group_0["weights"]["strategy"] == ("channel" if group is None else "group")
    assert ("a.b.weight_zero_point" in load_file(tmp_path / "model.safetensors")) is not symmetric


@pytest.mark.parametrize("nearer", ["a", "re:^a$"])
def test_a_name_counts_more_than_a_class(tmp_path: Path, nearer: str) -> None:
    given = weight(4, 16, True)
    write_compressed_tensors(tmp_path, {"a.weight": given})
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    own = groups.pop("group_0")
    every = {**own, "targets": ["Linear"], "weights": {**own["weights"], "num_bits": 8}}
    groups |= {"group_0": every, "group_1": {**own, "targets": [nearer]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(read_compressed_tensors(tmp_path).codes["a.weight"].q, given.codes.q)


def test_groups_in_an_order_of_their_own_are_not_read_as_if_side_by_side(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, {"a.weight": weight(4, 16, True)})
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"a.weight_g_idx": torch.randperm(64).int() // 16}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="a has groups of inputs in an order of their own"):
        read_compressed_tensors(tmp_path)


@pytest.mark.parametrize("columns", [80, 96])
def test_a_last_group_that_is_shorter_is_refused(tmp_path: Path, columns: int) -> None:
    """Of 80 columns in groups of 64 there are two groups, which are not of 40."""
    scheme = Weights(4, 64, True, "rtn")
    values = torch.randn(32, columns, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="a group size that divides the inputs"):
        write_compressed_tensors(tmp_path, {"a.weight": QuantizedWeight(rounded(values, scheme), 1, scheme, 0.0)})


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_package_reads_the_same_values(tmp_path: Path, bits: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    given = weight(bits, 16, symmetric)
    write_compressed_tensors(tmp_path, {"a.weight": given})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    stored = {n.removeprefix("a."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    read = BaseCompressor.get_value_from_registry(config["format"]).decompress(stored, scheme)["weight"]
    assert torch.equal(read, given.codes.dequantized())


def online(location: TransformLocation, module: str, order: int, inverse: bool = False) -> OnlineTransform:
    return OnlineTransform(module, location, Rotation.create("hadamard", order), inverse)


def declared(config: dict[str, Any]) -> Any:
    return declared_transforms(json.loads(json.dumps(config)))


def test_transforms_come_back_as_they_were_declared() -> None:
    given = (
        online("input", "layers.0.down", 16), online("input", "layers.1.down", 16, True),
        online("q_attn", "layers.0.attn", 12), online("k_cache", "layers.0.attn", 12),
    )  # fmt: skip
    config, tensors = transform_config(given)
    assert config["config_groups"]["hadamard16"]["type"] == "hadamard"
    assert config["config_groups"]["hadamard12"]["type"] == "random-hadamard"
    assert list(tensors) == ["layers.0.attn.hadamard12_q_attn.weight"]
    assert torch.equal(values_of(tensors["layers.0.attn.hadamard12_q_attn.weight"]), hadamard.matrix(12, torch.float32))
    found = resolved_transforms(declared(config), PLACES, tensors)
    assert set(found) == set(given)


def test_other_writers_name_modules_by_class_and_pattern_and_say_what_is_folded() -> None:
    config = {
        "config_groups": {
            "R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input", "inverse": True}]},
            "R4": {
                "type": "hadamard", "head_dim": None,
                "apply": [{"targets": ["re:.*down$"], "location": "input", "ignore": "layers.1.down"}],
            },
            "all": {"type": "hadamard", "head_dim": 8, "apply": [{"targets": "Linear", "location": "input", "ignore": ["re:layers.0"]}]},
        }
    }  # fmt: skip
    found = resolved_transforms(declared(config), PLACES, {})
    assert found == (online("input", "layers.0.down", 32), online("input", "layers.1.down", 8))


def test_another_matrix_of_signs_is_a_rotation_of_its_own() -> None:
    config, tensors = transform_config([online("q_attn", "layers.0.attn", 12), online("k_cache", "layers.0.attn", 12)])
    ((name, tensor),) = tensors.items()
    signs = torch.ones(12)
    signs[3:7] = -1
    matrix = values_of(tensor) * signs
    found = resolved_transforms(declared(config), PLACES, {name: matrix})
    assert torch.allclose(found[0].rotation.matrix(), matrix.double() / 12**0.5)


def without(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    (name, group), *_ = config["config_groups"].items()
    return {"config_groups": {name: {**group, **changed}}}


def test_what_is_not_declared_or_contradicts_is_refused() -> None:
    plain, _ = transform_config([online("input", "layers.0.down", 16)])
    both, tensors = transform_config([online("q_attn", "layers.0.attn", 12), online("k_cache", "layers.0.attn", 12)])
    ((name, tensor),) = tensors.items()
    (applied, keys) = both["config_groups"]["hadamard12"]["apply"]
    nothing: dict[str, Tensor] = {}
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (without(plain, type="random-matrix"), nothing, "the type 'random-matrix', which is not known"),
        (without(plain, block=4), nothing, "the setting 'block'"),
        (without(plain, randomize=True), nothing, "randomized by its loader"),
        (without(plain, head_dim="8"), nothing, "head_dim '8', which is no size"),
        (without(plain, apply=[{"targets": ["Linear"], "location": "output"}]), nothing, "the location 'output'"),
        (without(plain, apply=[{"targets": ["other"], "location": "input"}]), nothing, "input of other, which the model has"),
        (without(plain, head_dim=12), nothing, "no power of two"),
        (plain, {"layers.0.down.hadamard16_input.weight": torch.eye(16)}, "another matrix than Sylvester's"),
        (plain, {"layers.0.down.R4_input.weight": torch.eye(16)}, "does not declare"),
        (both, nothing, "no file holds the matrix of 12 channels"),
        (both, {name: values_of(tensor) * 2}, "no matrix of ±1"),
        (both, {name: torch.ones(12, 12)}, "not orthogonal"),
        (without(both, apply=[applied]), dict(tensors), "not rotated alike"),
        (without(both, apply=[applied, {**keys, "inverse": True}]), dict(tensors), "not rotated alike"),
    ]  # fmt: skip
    for config, held, why in cases:
        with pytest.raises(ConfigError, match=why):
            resolved_transforms(declared(config), PLACES, held)
    with pytest.raises(ConfigError, match="no plain Hadamard"):
        transform_config([OnlineTransform("a", "input", Rotation.create("random-hadamard", 8))])


def test_what_cannot_be_written_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    good, folder = weight(4, 16, True), tmp_path / "new"
    index = torch.randperm(64) // 16
    uneven = QuantizedWeight(rounded(torch.randn(8, 40), Weights(4, 16, method="rtn")), 1, Weights(4, 16), 0.0)
    small = replace(good, codes=replace(good.codes, scales=torch.full_like(good.codes.scales, 1e-9)))
    cases: list[tuple[QuantizedWeight, dict[str, Any], str]] = [
        (replace(good, dim=0), {}, r"not the weight \(out, in\) of one linear layer"),
        (replace(good, stack=2), {}, "not the weight"),
        (replace(good, codes=replace(good.codes, index=index)), {}, "no act-order"),
        (uneven, {}, "a group size that divides the inputs"),
        (weight(3, 16, True), {}, "3 bits, which versions of compressed-tensors pack differently"),
        (small, {"scales_dtype": torch.float16}, "scales that torch.float16 cannot hold"),
        (good, {"scales_dtype": torch.float64}, "is not float32, float16 or bfloat16"),
    ]
    for given, options, why in cases:
        with pytest.raises(ConfigError, match=why):
            write_compressed_tensors(folder, {"a.weight": given}, **options)
    assert not folder.exists()


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    def changed(edit: Any = None, tensors: Any = None) -> Path:
        write_compressed_tensors(tmp_path, {"a.weight": weight(4, 16, True)})
        config = json.loads((tmp_path / "config.json").read_text())
        if edit is not None:
            edit(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = load_file(tmp_path / "model.safetensors")
        if tensors is not None:
            tensors(stored)
        save_file(stored, tmp_path / "model.safetensors")
        return tmp_path

    def group(config: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = config["config_groups"]["group_0"]
        return found

    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (lambda c: c.update(quant_method="gptq"), None, ConfigError, "by 'gptq', not by compressed-tensors"),
        (lambda c: group(c).update(format="nvfp4-pack-quantized"), None, ConfigError, "format 'nvfp4-pack-quantized'"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), None, ConfigError, "a rounded cache"),
        (lambda c: group(c).update(input_activations={"num_bits": 8}), None, ConfigError, "rounds activations"),
        (lambda c: group(c)["weights"].update(type="float"), None, ConfigError, r"4 bits \(float, group\)"),
        (lambda c: group(c)["weights"].update(num_bits=3), None, ConfigError, "integers of 2, 4, 8 bits"),
        (lambda c: group(c).update(targets=["b"]), None, ConfigError, "no group of config.json is of a"),
        (lambda c: group(c)["weights"].update(group_size=32), None, ExportError, "do not fit a weight of 36x64"),
        (None, lambda t: t.pop("a.weight_scale"), ExportError, "the checkpoint is not whole"),
        (lambda c: group(c)["weights"].update(symmetric=False), None, ExportError, "the checkpoint is not whole"),
    ]  # fmt: skip
    for edit, tensors, error, why in cases:
        with pytest.raises(error, match=why):
            read_compressed_tensors(changed(edit, tensors))

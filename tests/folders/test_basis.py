"""Checkpoints that spinpass has rotated: read back bit for bit, what they declare, and whether it is so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spinpass
from spinpass import record
from spinpass.config import Override, RotationConfig
from spinpass.errors import ConfigError, VerificationError
from spinpass.folders import FOLDED, ExportRequest, carry_out, check_basis, export, rotate_checkpoint
from spinpass.folders.companions import write_manifest
from spinpass.formats import load_program, read_manifest, save_program
from spinpass.graph import values_of
from spinpass.loading import load_model
from spinpass.progress import Silent
from tests.support import folders
from tests.support.commands import document, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rotated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rotated") / "out"
    rotate_checkpoint(model, out, RotationConfig("R1,R2", "random-hadamard", seed=3, form="offline", tied="untie"))
    return out


def copied(folder: Path, out: Path, *left_out: str) -> Path:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*left_out))
    return out


def edited(folder: Path, edit: Any) -> None:
    """Change config.json, as somebody may who writes a manifest that fits."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_a_rotated_checkpoint_is_read_back_bit_for_bit(model: Path, rotated: Path) -> None:
    config = RotationConfig("R1,R2", "random-hadamard", seed=3, form="offline", tied="untie")
    made = spinpass.transform(load_model(model, cache=False).program, config)
    loaded = load_model(rotated, cache=False)
    assert loaded.program.state_dict.keys() == made.state_dict.keys()
    for name, tensor in made.state_dict.items():
        assert torch.equal(values_of(loaded.program.state_dict[name]), tensor), name
    found = record.read(made)
    assert found is not None and loaded.declared is not None
    assert loaded.declared.rotations == found.rotations and len(found.rotations) > 1
    assert loaded.report.notes == (f"its weights are rotated already, as it declares: {len(found.rotations)} spaces",)
    assert load_model(model, cache=False).declared is None


def test_a_gptq_checkpoint_is_read_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    result, _ = carry_out(ExportRequest(str(model), tmp_path / "out", FOLDED, "gptq", quantize="w8g32-rtn"), Silent())
    loaded = load_model(tmp_path / "out", cache=False, dequantize=True)
    assert loaded.program.state_dict.keys() == result.program.state_dict.keys()
    for name, tensor in result.program.state_dict.items():
        assert torch.equal(values_of(loaded.program.state_dict[name]), values_of(tensor)), name
    made = record.read(result.program)
    assert made is not None and loaded.declared is not None and loaded.declared.rotations == made.rotations


def test_programs_are_read_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    made = spinpass.transform(load_model(model).program)
    save_program(made, tmp_path / "m.pt2")
    read = load_program(tmp_path / "m.pt2")
    assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in made.state_dict.items())
    assert record.read(read) == record.read(made)


def test_a_folder_for_a_runtime_names_its_model(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "out", None, bits=16, cache=False)
    with pytest.raises(ConfigError, match="was exported for a runtime, and its weights are not read back"):
        load_model(tmp_path / "out")


def test_the_declared_basis_is_proved(model: Path, rotated: Path) -> None:
    result = run("verify", model, rotated)
    assert result.exit_code == 0, result.stderr
    assert "constants are the original's in the" in result.stdout and "equivalent" in result.stdout
    found = document(run("verify", model, rotated, "--json"))
    assert found["ok"] is True and found["basis"]["roundings"] == 0.0
    backwards = run("verify", rotated, model)
    assert backwards.exit_code == 0 and "in the declared bases" not in backwards.stdout


def test_a_declaration_survives_without_the_manifest(model: Path, rotated: Path, tmp_path: Path) -> None:
    alone = copied(rotated, tmp_path / "alone", "spinpass.json")
    loaded = load_model(alone, cache=False)
    assert loaded.declared is not None
    proof = check_basis(load_model(model, cache=False).program, loaded.program, loaded.declared)
    assert proof.roundings == 0.0 and proof.spaces == len(loaded.declared.rotations)


def test_a_rotated_checkpoint_is_not_rotated_again(rotated: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is rotated already .* name the original"):
        rotate_checkpoint(rotated, tmp_path / "again", FOLDED)


def test_declarations_that_disagree(rotated: Path, tmp_path: Path) -> None:
    folder = copied(rotated, tmp_path / "m")
    edited(folder, lambda config: config["spinpass"]["rotations"].update({"R1:residual": "0" * 64}))
    with pytest.raises(VerificationError, match=r"config\.json is not the file that spinpass\.json lists"):
        load_model(folder, cache=False)
    about = {name: value for name, value in read_manifest(folder).items() if name not in ("files", "digest")}
    write_manifest(folder, about | {"files": {}})
    with pytest.raises(VerificationError, match=r"disagree about the rotation of R1:residual"):
        load_model(folder, cache=False)
    edited(folder, lambda config: config.update(spinpass=3))
    with pytest.raises(VerificationError, match="declares rotations that cannot be read"):
        load_model(folder, cache=False)


def test_weights_that_are_not_in_the_declared_basis(model: Path, rotated: Path, tmp_path: Path) -> None:
    """Of another seed; and turned once more, by what leaves the function as it is."""
    original = load_model(model, cache=False).program
    folder = copied(rotated, tmp_path / "seed", "spinpass.json")
    edited(folder, lambda config: config["spinpass"]["config"].update(seed=4))
    loaded = load_model(folder, cache=False)
    assert loaded.declared is not None
    with pytest.raises(VerificationError, match=r"the checkpoint declares the rotation .* and its settings make"):
        check_basis(original, loaded.program, loaded.declared)
    folder = copied(rotated, tmp_path / "turned", "spinpass.json")
    weights = load_file(folder / "model.safetensors")
    for name, dim in (("up_proj", 0), ("gate_proj", 0), ("down_proj", 1)):
        name = f"model.layers.0.mlp.{name}.weight"
        weights[name] = weights[name].flip(dim).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = run("verify", model, folder)
    assert result.exit_code == 1 and "is not that of the original in the basis that it declares" in result.stderr
    edited(folder, lambda config: config.pop("spinpass"))
    undeclared = run("verify", model, folder)
    assert undeclared.exit_code == 0 and "declared" not in undeclared.stdout, "the function is the same"


def test_a_configuration_is_read_back() -> None:
    made = RotationConfig(
        "R1,R3", "random-hadamard", block_size=4, seed=2, overrides={"R3": Override(seed=3)}, exclude=("x",)
    )
    assert RotationConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    given = RotationConfig("R1", matrices={"R1": torch.eye(2)}).to_dict()
    assert RotationConfig.from_dict(given, {"R1": torch.eye(2)}).matrices.keys() == {"R1"}
    with pytest.raises(ConfigError, match="matrices were given for R1, and now for none"):
        RotationConfig.from_dict(given)
    with pytest.raises(ConfigError, match="this is no configuration of rotations"):
        RotationConfig.from_dict({"rotations": ["R1"]})

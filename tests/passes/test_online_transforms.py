"""Online rotations by the modules that they stand in, there and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass.certificate import verify
from spinpass.errors import ConfigError
from spinpass.passes import OnlineTransform, online_transforms, with_online_transforms
from spinpass.passes.online_transforms import transform_places
from spinpass.rotations import Rotation
from tests.support import programs
from tests.support.kronecker import by_factors

ONLINE = spinpass.RotationConfig(rotations=("R3", "R4"))


def rotated(name: str, config: spinpass.RotationConfig = ONLINE) -> tuple[ExportedProgram, ExportedProgram]:
    program = programs.program(name, "hf", torch.float32)
    return program, spinpass.transform(program, config)


def with_values(program: ExportedProgram, values: ExportedProgram) -> ExportedProgram:
    made = with_online_transforms(program, [])
    made = spinpass.graph.ProgramEditor(made).finish()
    made.state_dict.update(values.state_dict)
    return made


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_the_declaration_with_the_weights_is_the_rotated_program(name: str) -> None:
    program, made = rotated(name)
    found = online_transforms(made)
    places = {each.location: each.module for each in found}
    assert places["q_attn"] == places["k_cache"] == "model.layers.1.self_attn"
    assert places["input"] == "model.layers.1.mlp.down_proj" and len(found) == 6
    again = with_online_transforms(with_values(program, made), found)
    assert verify(made, again).ok and online_transforms(again) == found
    short = [each for each in found if each.location != "input"]
    assert not verify(made, with_online_transforms(with_values(program, made), short)).ok


def test_layers_that_read_one_value_share_its_rotation() -> None:
    program, made = rotated("llama", spinpass.RotationConfig(rotations=("R1",), form="online"))
    found = online_transforms(made)
    again = with_online_transforms(with_values(program, made), found)
    counts = [sum("hadamard" in str(n.target) for n in p.graph.nodes) for p in (made, again)]
    assert counts[0] == counts[1] < len(found) and verify(made, again).ok


def test_what_has_no_name_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="c_proj.weight, is not that of a torch.nn.Linear of that name"):
        online_transforms(rotated("gpt2", spinpass.RotationConfig(rotations=("R4",)))[1])
    stream = spinpass.RotationConfig(rotations=("R1",), form="offline", tied="untie")
    with pytest.raises(ConfigError, match="names for the inputs of linear layers, for queries and for keys alone"):
        online_transforms(rotated("gemma2", stream)[1])


def test_what_the_program_has_not_is_refused() -> None:
    program = programs.program("llama", "hf", torch.float32)
    width = transform_places(program)["input"]["model.layers.0.mlp.down_proj"]
    assert width == ("Linear", 80)
    good = OnlineTransform("model.layers.0.mlp.down_proj", "input", Rotation.create("hadamard", 16))
    cases = [
        ([replace(good, module="model.layers.7.mlp.down_proj")], "which the program has not"),
        ([replace(good, location="q_attn")], "q_attn of model.layers.0.mlp.down_proj, which the program has not"),
        ([good, replace(good, inverse=True)], "two transforms are declared of input"),
        ([replace(good, rotation=Rotation.create("hadamard", 12))], "of 12 channels is declared .*, which has 80"),
    ]
    for given, why in cases:
        with pytest.raises(ConfigError, match=why):
            with_online_transforms(program, given)


def test_any_orthogonal_matrix_may_stand_there() -> None:
    program = programs.program("llama", "hf", torch.float32)
    rotation = Rotation.create("random-matrix", 16, seed=1)
    there = OnlineTransform("model.layers.0.self_attn", "q_attn", rotation)
    both = [there, replace(there, location="k_cache")]
    assert verify(program, with_online_transforms(program, both)).ok, "scores are what they were"
    assert not verify(program, with_online_transforms(program, [there])).ok


@pytest.mark.parametrize("how", ["factors", "random-hadamard", "random-matrix"])
def test_what_is_no_plain_hadamard_is_refused(how: str) -> None:
    program = programs.program("llama", "hf", torch.float32)
    config = spinpass.RotationConfig(rotations="R3", verify=False)
    drawn = {"matrices": by_factors(program, config)} if how == "factors" else {"kind": how}
    made = spinpass.transform(program, replace(config, **drawn))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stays online and is no plain Hadamard, and a layout declares those alone"):
        online_transforms(made)

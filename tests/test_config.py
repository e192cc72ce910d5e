"""Settings: what they accept, what they say when they do not, and which of them a space gets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from spinpass import ConfigError, Override, RotationConfig


def test_defaults_take_all_rotations() -> None:
    assert RotationConfig().rotations == ("R1", "R2", "R3", "R4", "latent")


@pytest.mark.parametrize(
    ("given", "taken"), [("R3,R1", ("R1", "R3")), (["R2"], ("R2",)), (("R4", "R4"), ("R4",)), ("R1, R2", ("R1", "R2"))]
)
def test_rotations_are_put_in_order(given: Any, taken: tuple[str, ...]) -> None:
    assert RotationConfig(rotations=given).rotations == taken


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(rotations=("R5",)), r"unknown rotation 'R5'; choose from R1, R2, R3, R4"),
        (dict(rotations=()), "no rotation is chosen"),
        (
            dict(kind="dft"),
            r"kind='dft' is not one of hadamard, random-hadamard, random-matrix; pass a matrix of your own",
        ),
        (dict(block_size=0), "block_size=0 is not a positive integer"),
        (dict(block_size=2.0), r"block_size=2.0 is not a positive integer"),
        (dict(tied="maybe"), "tied='maybe' is not one of keep, untie, auto"),
        (dict(form="inline"), "form='inline' is not one of auto, offline, online"),
        (dict(cache="lost"), "cache='lost' is not one of rotated, plain"),
        (dict(seed=1.5), "seed=1.5 is not an integer"),
        (
            dict(overrides={"model.layers": Override()}),
            "'model.layers' names neither a rotation nor a space.*see spinpass.plan",
        ),
        (dict(matrices={"q_proj": torch.eye(2)}), "'q_proj' names neither"),
        (dict(kind=None), "kind=None is not one of hadamard"),
        (dict(block_size=True), "block_size=True is not a positive integer"),
        (dict(seed=True), "seed=True is not an integer"),
        (dict(verify="yes"), "verify='yes' is not True, False or None"),
        (dict(verify=1), "verify=1 is not True, False or None"),
        (dict(rotations=3), "rotations=3 is no sequence of names"),
        (dict(rotations=None), "rotations=None is no sequence of names"),
        (dict(rotations=(1,)), r"rotations=\(1,\) is no sequence of names"),
        (dict(exclude=None), "exclude=None is no sequence of names"),
        (dict(exclude=(3,)), r"exclude=\(3,\) is no sequence of names"),
        (dict(overrides=None), "overrides=None is no mapping by the names"),
        (dict(overrides=[1]), r"overrides=\[1\] is no mapping by the names"),
        (dict(matrices=3), "matrices=3 is no mapping by the names"),
        (dict(overrides={"R2": "hadamard"}), "the override for 'R2' is a str, not a spinpass.Override"),
        (dict(matrices={"R1": [[1.0]]}), "the matrix for 'R1' is a list, neither a torch.Tensor nor a spinpass.Rotation"),
        (dict(seed=3), "seed=3 changes nothing: kind='hadamard' draws nothing"),
        (dict(form="online", rotations="R2,R4"), r"form='online' is of R1, and R1 is not among the rotations \(R2, R4\)"),
        (dict(tied="untie", rotations="R2"), "tied='untie' is of R1"),
    ],
)
def test_values_that_cannot_be_used(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RotationConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "text"), [(dict(kind="dft"), "kind='dft'"), (dict(block_size=-1), "block_size=-1"), (dict(seed="q"), "seed='q'"), (dict(seed=1.5), "seed=1.5")]
)
def test_overrides_are_checked_alike(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Override(**settings)


def test_a_seed_has_an_effect_where_anything_is_drawn() -> None:
    assert RotationConfig(kind="random-matrix", seed=3).seed == 3
    assert RotationConfig(seed=3, overrides={"R2": Override(kind="random-hadamard")}).settings("R2:x").seed == 3


def test_the_most_specific_override_wins() -> None:
    config = RotationConfig(
        kind="hadamard",
        block_size=8,
        overrides={
            "R2": Override(kind="random-hadamard", seed=1),
            "R2:model.layers.1.*": Override(seed=2),
            "R2:model.layers.1.self_attn": Override(block_size=4),
        },
    )
    assert config.settings("R1:residual") == Override("hadamard", 8, 0)
    assert config.settings("R2:model.layers.0.self_attn") == Override("random-hadamard", 8, 1)
    assert config.settings("R2:model.layers.1.self_attn") == Override("random-hadamard", 4, 2)


def test_the_most_specific_matrix_wins() -> None:
    a, b = torch.eye(2), -torch.eye(2)
    config = RotationConfig(matrices={"R3": a, "R3:x.*": b})
    assert config.matrix("R3:y") is a and config.matrix("R3:x.1") is b and config.matrix("R4:x") is None


def test_exclusion_by_space_module_or_parameter() -> None:
    config = RotationConfig(exclude=("R4:*down", "model.layers.0.*", "*.bias"))
    assert config.excludes("R4:a.down", []) == "R4:*down"
    assert config.excludes("R2:model.layers.0.self_attn", []) == "model.layers.0.*"
    assert config.excludes("R1:residual", ["a.weight", "a.bias"]) == "*.bias"
    assert config.excludes("R1:residual", ["a.weight"]) is None
    assert RotationConfig(exclude="R1:*").exclude == ("R1:*",)


def test_to_dict_is_json_and_names_matrices_only() -> None:
    config = RotationConfig(
        rotations="R1,R3", overrides={"R3": Override(seed=3)}, matrices={"R1": torch.eye(2)}, exclude=("x",)
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert data["rotations"] == ["R1", "R3"] and data["matrices"] == ["R1"] and data["exclude"] == ["x"]
    assert data["overrides"] == {"R3": {"kind": None, "block_size": None, "seed": 3}}
    assert data["form"] == data["tied"] == "auto"

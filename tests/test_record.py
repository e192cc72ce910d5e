"""What a rotated program says about itself survives everything that users do to programs."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import record
from spinpass.record import Carried, Record
from spinpass.rotations.rotation import Rotation
from tests.support import modules
from tests.support.decoders import Decoder, exported, made


@pytest.fixture(scope="module")
def rotated() -> ExportedProgram:
    source = modules.export(dtype=torch.float64, cache=True, bias="all")
    return spinpass.transform(source, spinpass.RotationConfig(kind="random-hadamard", verify=False))


def test_a_program_that_was_not_rotated_has_none() -> None:
    assert record.read(exported(made(Decoder()))) is None


def test_a_cache_is_named_on_both_sides(rotated: ExportedProgram) -> None:
    found = record.read(rotated)
    assert found is not None
    assert len(found.inputs) == len(found.outputs) == 4 and 0 not in found.outputs
    for carried in (*found.inputs.values(), *found.outputs.values()):
        assert carried.dim == -1 and carried.space in found.rotations
        assert carried.rotation.fingerprint() == found.rotations[carried.space]
    assert {c.space.split(":")[0] for c in found.inputs.values()} == {"R2", "R3"}
    assert found.config["kind"] == "random-hadamard"


def test_it_survives_copies_files_and_decompositions(rotated: ExportedProgram) -> None:
    found = record.read(rotated)
    buffer = io.BytesIO()
    torch.export.save(rotated, buffer)
    buffer.seek(0)
    assert record.read(torch.export.load(buffer)) == found
    assert record.read(copy.deepcopy(rotated)) == found
    assert record.read(rotated.run_decompositions({})) == found
    assert record.read(rotated.run_decompositions()) == found


@pytest.mark.parametrize(
    "rotation",
    [
        Rotation.create("hadamard", 12),
        Rotation.create("random-hadamard", 12, block_size=4, seed=7, identity="x"),
        Rotation.create("random-matrix", 6, seed=2),
        Rotation.from_matrix(torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]),
    ],
)
def test_json_round_trip(rotation: Rotation) -> None:
    before = Record(
        "1", {"k": Carried(rotation, -1, "R3:a")}, {2: Carried(rotation, -2, "R2:b")}, {"seed": 1}, {"R3:a": "f"}
    )
    after = Record.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.to_dict() == before.to_dict()
    assert torch.equal(after.inputs["k"].rotation.matrix(), rotation.matrix())
    assert list(after.outputs) == [2]


def test_the_original_program_is_not_marked() -> None:
    source = exported(made(Decoder()))
    spinpass.transform(source)
    assert record.read(source) is None

"""Rotations between what writes a space and what reads it, inserted and then folded."""

from __future__ import annotations

import pytest

from spinpass.graph import ProgramEditor
from spinpass.passes.fold import fold_rotation
from spinpass.passes.insert_rotations import insert_rotations
from spinpass.passes.materialize import materialize_expressions
from spinpass.rotations import Rotation
from tests.support.decoders import Decoder, exported, made
from tests.support.passes import error, finished, fuse, stream, targets


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
@pytest.mark.parametrize("block", [None, 8])
def test_rotations_inserted_and_folded(kind: str, block: int | None) -> None:
    before = exported(made(Decoder(norm="rms", post_norm=True, tied=True)))
    editor = ProgramEditor(before)
    space = stream(editor)
    rotation = Rotation.create(kind, 24, block_size=block, seed=1, identity="x")  # type: ignore[arg-type]
    after, _ = finished(
        editor,
        space,
        materialize_expressions,
        fuse,
        lambda e, s: insert_rotations(e, s, rotation, "R1:x"),
        lambda e, s: fold_rotation(e, s, rotation),
    )
    assert error(before, after) <= 1e-12
    word = "matmul" if kind == "random-matrix" else "hadamard"
    assert targets(after, word) - targets(before, word) == len(space.entries) + len(space.exits) > 0
    created = [n for n in after.graph.nodes if n.meta.get("custom", {}).get("spinpass_origin")]
    assert created and all(
        n.meta["custom"]["spinpass_origin"] == "R1:x" and "R1:x" in n.meta["stack_trace"] for n in created
    )

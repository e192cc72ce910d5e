"""What is folded is the rotation of rows or columns."""

from __future__ import annotations

import torch

from spinpass.graph import ProgramEditor
from spinpass.passes.fold import fold_rotation
from spinpass.passes.materialize import materialize_expressions
from spinpass.rotations import Rotation
from tests.support.decoders import Decoder, exported, made
from tests.support.passes import finished, stream


def test_a_fold_is_the_rotation_of_rows_or_columns() -> None:
    before = exported(made(Decoder(norm="rms_plain", bias=True)))
    editor = ProgramEditor(before)
    rotation = Rotation.create("random-hadamard", 24, seed=1, identity="x")
    after, _ = finished(editor, stream(editor), materialize_expressions, lambda e, s: fold_rotation(e, s, rotation))
    r = rotation.matrix()
    old, new = before.state_dict, after.state_dict
    for name, expected in {
        "embed.weight": old["embed.weight"] @ r,
        "blocks.0.attn.q.weight": old["blocks.0.attn.q.weight"] @ r,
        "blocks.0.attn.o.weight": r.T @ old["blocks.0.attn.o.weight"],
        "blocks.0.attn.o.bias": old["blocks.0.attn.o.bias"] @ r,
    }.items():
        torch.testing.assert_close(new[name], expected, rtol=0, atol=1e-13)
    assert new["blocks.0.attn.q.bias"] is old["blocks.0.attn.q.bias"]

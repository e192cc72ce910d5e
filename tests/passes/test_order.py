"""The passes one after another, in the order in which the pipeline runs them."""

from __future__ import annotations

from typing import Any

import pytest

import spinpass
from spinpass import pipeline
from spinpass.graph import ProgramEditor
from spinpass.passes.materialize import materialize_expressions
from tests.support.decoders import Decoder, exported, made
from tests.support.passes import centred, error, finished, fuse, stream, targets


def test_the_order_of_the_passes() -> None:
    assert [each.name for each in pipeline.PASSES] == [
        "Materialize",
        "FuseNormScale",
        "Center",
        "InsertRotations",
        "FoldRotations",
    ]


@pytest.mark.parametrize(
    "settings",
    [dict(norm="ln", bias=True), dict(norm="rms", tied=True), dict(norm="rms1", qk_norm=True, parallel=True)],
)
def test_every_prefix_of_the_pipeline_that_ends_before_the_rotations_keeps_the_function(
    settings: dict[str, Any],
) -> None:
    before = exported(made(Decoder(**settings)))
    for passes in ((), (materialize_expressions,), (materialize_expressions, fuse), (materialize_expressions, fuse, centred)):
        editor = ProgramEditor(before)
        after, _ = finished(editor, stream(editor), *passes)
        assert error(before, after) <= 1e-12


def test_op_counts_of_a_rotated_layer() -> None:
    """Nothing but the online parts is added, norm scales are gone."""
    before = exported(made(Decoder(norm="rms_op")))
    after = spinpass.transform(before, spinpass.RotationConfig(form="offline"))
    assert targets(after, "hadamard") == 3  # q, k and the input of the down projection
    assert (
        len([n for n in after.graph.nodes if n.op == "call_function"])
        == len([n for n in before.graph.nodes if n.op == "call_function"]) + 3
    )
    assert targets(after, "rms_norm") == targets(before, "rms_norm")

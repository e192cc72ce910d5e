"""Each pass alone: it fires, near misses stay as they are, the function is kept in float64 and in the model's dtype, the structure is the
expected one, names and metadata stay, and a second run finds nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import spinpass
from spinpass.analysis.basis.space import Space
from spinpass.analysis.basis.walk import Walk
from spinpass.analysis.patterns.linear import whole_axis
from spinpass.analysis.patterns.residual import find_residual_sums
from spinpass.certificate.programs import run
from spinpass.graph.editor import ProgramEditor, op_name, shape
from spinpass.passes.center import center
from spinpass.passes.fold import fold_rotation
from spinpass.passes.fuse_norm_scale import fuse_norm_scale
from spinpass.passes.insert_rotations import insert_rotations
from spinpass.passes.materialize import materialize
from spinpass.passes.untie import untie
from spinpass.rotations.rotation import Rotation
from tests.support import modules
from tests.support.decoders import NORMS, Decoder, exported, made, relative_error, tokens

transform = import_module("spinpass.pipeline")
SCALED = [n for n in NORMS if not n.endswith("plain")]


def stream(editor: ProgramEditor) -> Space:
    node = next(iter(n for n in find_residual_sums(editor) if shape(n)[-1] == 24))
    return Walk(editor).grow(node, whole_axis(node, 2))


def finished(
    editor: ProgramEditor, space: Space, *passes: Callable[[ProgramEditor, Space], Space]
) -> tuple[ExportedProgram, Space]:
    for one in passes:
        space = one(editor, space)
    return editor.finish(), space


def fuse(editor: ProgramEditor, space: Space) -> Space:
    return fuse_norm_scale(editor, space, "R1:residual")


def centred(editor: ProgramEditor, space: Space) -> Space:
    return center(editor, space, "R1:residual")


def error(before: ExportedProgram, after: ExportedProgram) -> float:
    return relative_error(run(before, (tokens(),), float64=True), run(after, (tokens(),), float64=True))


def targets(program: ExportedProgram, word: str) -> int:
    return sum(word in op_name(n) for n in program.graph.nodes)


# -- FuseNormScale ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", SCALED)
@pytest.mark.parametrize("bias", [False, True])
def test_scales_move_into_the_linears_and_the_function_stays(norm: str, bias: bool) -> None:
    before = exported(made(Decoder(norm=norm, bias=bias)))
    editor = ProgramEditor(before)
    space = stream(editor)
    assert space.scales
    after, _ = finished(editor, space, materialize, fuse)
    assert error(before, after) <= 1e-12
    used = {
        s.target
        for s in after.graph_signature.input_specs
        if any(n.name == s.arg.name and n.users for n in after.graph.nodes)
    }
    assert not [t for t in used if t and "norm" in t], "a norm's parameter is still read"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_in_narrow_dtypes_round_once(dtype: torch.dtype) -> None:
    before = exported(made(Decoder(norm="rms1"), dtype=dtype))
    editor = ProgramEditor(before)
    after, _ = finished(editor, stream(editor), materialize, fuse)
    gain, weight = before.state_dict["blocks.0.norm1.weight"], before.state_dict["blocks.0.attn.q.weight"]
    expected = (weight.double() * (1.0 + gain.double())).to(dtype)
    assert torch.equal(after.state_dict["blocks.0.attn.q.weight"].detach(), expected.detach())
    assert not after.state_dict["blocks.0.norm1.weight"].any(), "1 + weight is folded: what is stored stands for 1"


def test_norm_biases_become_linear_biases() -> None:
    before = exported(made(Decoder(norm="ln")))
    editor = ProgramEditor(before)
    after, _ = finished(editor, stream(editor), materialize, fuse)
    added = sorted(after.state_dict.keys() - before.state_dict.keys())
    assert added == sorted(
        f"{x}.bias"
        for x in (
            "blocks.0.attn.k",
            "blocks.0.attn.q",
            "blocks.0.attn.v",
            "blocks.0.mlp.gate",
            "blocks.0.mlp.up",
            "head",
        )
    )
    torch.testing.assert_close(
        after.state_dict["head.bias"], before.state_dict["head.weight"] @ before.state_dict["norm.bias"]
    )


def test_without_a_scale_there_is_nothing_to_fuse() -> None:
    before = exported(made(Decoder(norm="rms_plain")))
    editor = ProgramEditor(before)
    space = stream(editor)
    graph = str(editor.graph)
    fuse(editor, space)
    assert not space.scales and str(editor.graph) == graph


def test_fused_norms_are_found_bare_the_second_time() -> None:
    editor = ProgramEditor(exported(made(Decoder(norm="ln_nobias"))))
    after, _ = finished(editor, stream(editor), materialize, fuse)
    assert (
        not ProgramEditor(after).graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor, sort=False)
        or True
    )
    again = stream(ProgramEditor(after))
    assert all(
        "norm" not in n.name or not any(a.name.startswith("p_") for a in n.all_input_nodes) for n in again.scales
    )


# -- Center -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["ln", "ln_nobias", "ln_plain", "ln_spelled"])
@pytest.mark.parametrize("positions", [False, True])
def test_centring_moves_into_the_writers(norm: str, positions: bool) -> None:
    before = exported(made(Decoder(norm=norm, bias=True, positions=positions)))
    editor = ProgramEditor(before)
    space = stream(editor)
    assert space.centred
    after, _ = finished(editor, space, materialize, fuse, centred)
    assert error(before, after) <= 1e-12
    assert targets(after, "layer_norm") == 0 and targets(after, "mean") <= 3
    for name in ("embed.weight", "blocks.0.attn.o.bias", "blocks.0.mlp.down.bias"):
        assert float(after.state_dict[name].mean(-1).abs().max()) < 1e-12
    assert float(after.state_dict["blocks.0.mlp.down.weight"].mean(0).abs().max()) < 1e-12


@pytest.mark.parametrize("norm", ["rms", "rms1", "rms_op"])
def test_rms_models_are_never_centred(norm: str) -> None:
    editor = ProgramEditor(exported(made(Decoder(norm=norm))))
    space = stream(editor)
    assert not space.centred and centred(editor, space) == space
    after = spinpass.transform(exported(made(Decoder(norm=norm))))
    assert float(after.state_dict["embed.weight"].mean(-1).abs().max()) > 1e-3


# -- InsertRotations, FoldRotations ---------------------------------------------------------------------------------------------------------------


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
        materialize,
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


def test_a_fold_is_the_rotation_of_rows_or_columns() -> None:
    before = exported(made(Decoder(norm="rms_plain", bias=True)))
    editor = ProgramEditor(before)
    rotation = Rotation.create("random-hadamard", 24, seed=1, identity="x")
    after, _ = finished(editor, stream(editor), materialize, lambda e, s: fold_rotation(e, s, rotation))
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


# -- Untie, Materialize -----------------------------------------------------------------------------------------------------------------------------


def test_untying_gives_every_use_its_own_constant() -> None:
    before = exported(made(Decoder(tied=True)))
    editor = ProgramEditor(before)
    table = next(
        n for n in editor.nodes if editor.is_stored(n) and len(n.users) == 2 and "embed.weight" in editor.fqns(n)
    )
    copies = untie(editor, [table])
    assert len(copies) == 1 and len(table.users) == len(copies[0].users) == 1
    editor.queue(copies[0], lambda t: t * 1.0)
    after = editor.finish()
    assert error(before, after) == 0
    assert after.state_dict.keys() == before.state_dict.keys()
    again = ProgramEditor(after)
    assert untie(again, [n for n in again.nodes if again.is_stored(n) and n.users]) == []


def test_expressions_of_constants_are_materialized_once() -> None:
    before = modules.export(dtype=torch.float64, linear="conv1d").run_decompositions()
    after = spinpass.transform(before, spinpass.RotationConfig(form="offline", verify=False))
    assert spinpass.verify(before, after).ok
    names = [k for k in after.state_dict if k.startswith("spinpass.")]
    assert len(names) == len(set(names))


# -- the pipeline -------------------------------------------------------------------------------------------------------------------------------------


def test_the_order_of_the_passes() -> None:
    assert [name for name, _ in transform.PASSES] == [
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
    for passes in ((), (materialize,), (materialize, fuse), (materialize, fuse, centred)):
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

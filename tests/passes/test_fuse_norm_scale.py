"""Scales and biases of norms move into the linear layers that read them."""

from __future__ import annotations

import pytest
import torch

from spinpass.graph import ProgramEditor
from spinpass.passes.materialize import materialize_expressions
from tests.support.decoders import NORMS, Decoder, exported, made
from tests.support.passes import error, finished, fuse, stream

SCALED = [n for n in NORMS if not n.endswith("plain")]


@pytest.mark.parametrize("norm", SCALED)
@pytest.mark.parametrize("bias", [False, True])
def test_scales_move_into_the_linears_and_the_function_stays(norm: str, bias: bool) -> None:
    before = exported(made(Decoder(norm=norm, bias=bias)))
    editor = ProgramEditor(before)
    space = stream(editor)
    assert space.scales
    after, _ = finished(editor, space, materialize_expressions, fuse)
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
    after, _ = finished(editor, stream(editor), materialize_expressions, fuse)
    gain, weight = before.state_dict["blocks.0.norm1.weight"], before.state_dict["blocks.0.attn.q.weight"]
    expected = (weight.double() * (1.0 + gain.double())).to(dtype)
    assert torch.equal(after.state_dict["blocks.0.attn.q.weight"].detach(), expected.detach())
    assert not after.state_dict["blocks.0.norm1.weight"].any(), "1 + weight is folded: what is stored stands for 1"


def test_norm_biases_become_linear_biases() -> None:
    before = exported(made(Decoder(norm="ln")))
    editor = ProgramEditor(before)
    after, _ = finished(editor, stream(editor), materialize_expressions, fuse)
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
    after, _ = finished(editor, stream(editor), materialize_expressions, fuse)
    assert (
        not ProgramEditor(after).graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor, sort=False)
        or True
    )
    again = stream(ProgramEditor(after))
    assert all(
        "norm" not in n.name or not any(a.name.startswith("p_") for a in n.all_input_nodes) for n in again.scales
    )

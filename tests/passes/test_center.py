"""The centring of LayerNorm moves into what writes the stream."""

from __future__ import annotations

import pytest

import spinpass
from spinpass.graph import ProgramEditor
from spinpass.passes.materialize import materialize_expressions
from tests.support.decoders import Decoder, exported, made
from tests.support.passes import centred, error, finished, fuse, stream, targets


@pytest.mark.parametrize("norm", ["ln", "ln_nobias", "ln_plain", "ln_spelled"])
@pytest.mark.parametrize("positions", [False, True])
def test_centring_moves_into_the_writers(norm: str, positions: bool) -> None:
    before = exported(made(Decoder(norm=norm, bias=True, positions=positions)))
    editor = ProgramEditor(before)
    space = stream(editor)
    assert space.centred
    after, _ = finished(editor, space, materialize_expressions, fuse, centred)
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

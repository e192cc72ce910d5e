"""Quantized programs: what is rounded where, that it is exactly what the codes say, and that rotation helps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import spinpass
from spinpass.errors import ConfigError
from spinpass.evaluation.scoring import ProgramScorer
from spinpass.execution.interpreter import run
from spinpass.quantization import Activations, Cache, QuantizationConfig, Weights, quantize
from spinpass.quantization.rounding.ranges import token_clip
from tests.support.decoders import HEADS, SEQ, VOCAB
from tests.support.quantizable import error, inputs, nodes, outlying, program

aten = torch.ops.aten


def test_constants_are_what_their_codes_stand_for() -> None:
    source = program()
    kept = {name: t.clone() for name, t in source.state_dict.items()}
    result = quantize(source, "w4-rtn-asym")
    assert len(result.report.weights) == 14
    for name, weight in result.report.weights.items():
        assert torch.equal(result.program.state_dict[name], weight.codes.dequantized()), name
        assert 0 < weight.error < 0.05
    assert all(torch.equal(t, source.state_dict[name]) for name, t in kept.items()), "the input program was changed"
    others = set(kept) - set(result.report.weights)
    assert {"embed.weight", "head.weight"} <= others
    assert all(torch.equal(kept[name], result.program.state_dict[name]) for name in others)


def test_the_head_and_the_table_are_left_unless_asked_for() -> None:
    result = quantize(program(), "w8-rtn-head8-embed8")
    assert {"embed.weight", "head.weight"} <= set(result.report.weights)
    assert "not asked for" in quantize(program(), "w8-rtn").report.kept.values()


def test_an_input_is_rounded_once_for_all_its_linears() -> None:
    result = quantize(program(), "a8")
    rounding = nodes(result.program, "round_tokens")
    # per layer: attention input, output projection, feed-forward input, down projection
    assert len(rounding) == 8 == len(result.report.activations)
    assert sorted(len(n.users) for n in rounding) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert all(u.target is aten.linear.default for n in rounding for u in n.users)


def test_a_cache_is_rounded_behind_rope_and_before_heads_are_repeated() -> None:
    rotated = spinpass.transform(program(), spinpass.RotationConfig(verify=False))
    result = quantize(rotated, "kv4")
    rounding = nodes(result.program, "round_tokens")
    assert len(rounding) == 4
    assert not any(HEADS in n.meta["val"].shape[1:] for n in rounding), "as many heads as there are keys"
    keys = [n for n in rounding if "hadamard" in str(n.args[0].target)]  # type: ignore[union-attr]
    assert len(keys) == 2, "R3 stands in front of the rounding"


def test_the_share_of_a_range_that_is_covered_is_chosen_for_four_bits() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    share = token_clip([x], 4, False)
    assert 0.7 < share < 0.95
    kept, whole = ((torch.ops.spinpass.round_tokens(x, 4, False, c) - x).square().mean() for c in (share, 1.0))
    assert kept < 0.95 * whole
    result = quantize(program(), "a4-kv4", inputs())
    shares = [n.args[3] for n in nodes(result.program, "round_tokens")]
    assert len(shares) == 12 and any(s < 1 for s in shares)  # type: ignore[operator]
    given = quantize(program(), QuantizationConfig(None, Activations(4, clip=0.9), Cache(4, clip=0.8)), inputs())
    assert {n.args[3] for n in nodes(given.program, "round_tokens")} == {0.9, 0.8}
    assert {n.args[3] for n in nodes(quantize(program(), "a4-kv4").program, "round_tokens")} == {1.0}


def test_a_range_of_every_channel_is_a_constant_of_the_program() -> None:
    one, each = (quantize(outlying(), scheme, inputs()) for scheme in ("a8static", "a8channel"))
    rounding = nodes(each.program, "round_tensor")
    assert len(rounding) == 8 and all(n.args[1].meta["val"].shape == n.meta["val"].shape[-1:] for n in rounding)
    assert error(outlying(), each.program) < error(outlying(), one.program)


def test_static_ranges_become_constants() -> None:
    result = quantize(program(), "a8static", inputs())
    rounding = nodes(result.program, "round_tensor")
    assert len(rounding) == 8
    scales = [t for name, t in result.program.state_dict.items() if name.endswith(".scale")]
    assert len({float(s) for s in scales}) == 8 and not any(float(s) == 1.0 for s in scales)
    assert not nodes(result.program, "round_rows"), "no token stands out"
    assert error(program(), result.program) < 1e-3


def test_gptq_beats_rounding_on_the_inputs_it_saw() -> None:
    plain, made_with = (quantize(program(), f"w3-{how}", inputs(32)) for how in ("rtn", "gptq"))
    names = set(made_with.report.weights)
    better = sum(made_with.report.weights[n].error < plain.report.weights[n].error for n in names)
    assert better >= len(names) - 1


def test_later_layers_are_calibrated_on_what_earlier_ones_became() -> None:
    """The last weight depends on how coarsely the first was rounded, with the same rounding of its own."""
    last = "blocks.1.mlp.down.weight"
    coarse = QuantizationConfig(weights=None, overrides={"blocks.0.*": Weights(2), last: Weights(4)})
    fine = QuantizationConfig(weights=None, overrides={"blocks.0.*": Weights(8), last: Weights(4)})
    a, b = (quantize(program(), config, inputs()).report.weights[last].codes.q for config in (coarse, fine))
    assert not torch.equal(a, b)
    rounded = QuantizationConfig(weights=None, overrides={last: Weights(4)}, activations=Activations(4))
    exact = QuantizationConfig(weights=None, overrides={last: Weights(4)})
    a, b = (quantize(program(), config, inputs()).report.weights[last].codes.q for config in (rounded, exact))
    assert not torch.equal(a, b)


def test_a_weight_that_follows_the_original_program_ends_nearer_to_it() -> None:
    """Behind a coarsely rounded first layer."""
    first = {"blocks.0.*": Weights(2, method="rtn")}
    errors = []
    for follow in (True, False):
        config = QuantizationConfig(Weights(8, follow=follow), overrides=first)
        errors.append(error(program(), quantize(program(), config, inputs(32)).program))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("scheme", ["w3-rtn", "a4", "kv4"])
def test_rotation_helps_where_there_are_outliers(scheme: str) -> None:
    source = outlying()
    rotated = spinpass.transform(source, spinpass.RotationConfig(form="online", verify=False))
    plain, better = (error(p, quantize(p, scheme, inputs()).program) for p in (source, rotated))
    assert better < plain


def test_a_quantized_program_scores_and_reports(tmp_path: Any) -> None:
    result = quantize(program(), "w4-a8-kv8", inputs())
    json.dumps(result.report.to_dict())
    assert result.report.bytes_after < result.report.bytes_before
    torch.export.save(result.program, tmp_path / "q.pt2")
    again = torch.export.load(tmp_path / "q.pt2")
    ids = list(range(SEQ))
    assert torch.equal(ProgramScorer(again).logits(ids), ProgramScorer(result.program).logits(ids))


def test_scores_are_those_of_the_program() -> None:
    ids = torch.arange(2 * SEQ).reshape(2, SEQ) % VOCAB
    expected = run(program(), (ids,))[0]
    assert torch.allclose(ProgramScorer(program()).logits(ids[1].tolist()), expected[1], atol=1e-5)


@pytest.mark.parametrize("how", ["rtn", "gptq", "gptq-order"])
def test_a_last_group_may_be_shorter(how: str) -> None:
    codes = quantize(program(), f"w4g16-{how}", inputs()).report.weights["blocks.0.attn.q.weight"].codes
    assert codes.scales.shape[1] == 2 and codes.group_of.tolist() == [0] * 16 + [1] * 8
    assert codes.group_length == 16


def test_matrices_of_rotations_are_not_quantized() -> None:
    dense = spinpass.RotationConfig(rotations=("R4",), kind="random-matrix", verify=False)
    result = quantize(spinpass.transform(program(), dense), "w4-rtn-a8")
    assert len(result.report.weights) == 14 and "a factor of a rotation" in result.report.kept.values()


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="per_channel need ranges that are known before: static=True"):
        Activations(8, per_channel=True)
    with pytest.raises(ConfigError, match="calibration inputs"):
        quantize(program(), "w4")
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantize(program(), QuantizationConfig(weights=Weights(method="rtn"), exclude=("*",)))
    for settings in (dict(exclude=("blocks.9.*",)), dict(overrides={"blocks.9.*": Weights(2, method="rtn")})):
        with pytest.raises(ConfigError, match=r"'blocks.9.\*' is no linear layer or table of this program that can be rounded; the nearest is 'blocks"):
            quantize(program(), QuantizationConfig(weights=Weights(method="rtn"), **settings))  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        quantize(program(), "a8static", [(torch.zeros(1), 1, 2)])
    assert QuantizationConfig(cache=Cache(8)).cache == Cache(8)

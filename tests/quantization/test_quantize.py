"""Quantized programs: what is rounded where, that it is exactly what the integers say, and that rotation helps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ConfigError
from spinpass.evaluation.scoring import ProgramScorer
from spinpass.execution.interpreter import run
from spinpass.quantization import Activations, Cache, QuantizationConfig, Weights, quantize
from spinpass.quantization.rounding.ranges import static_range, token_clip
from tests.support.decoders import HEADS, SEQ, VOCAB, Decoder, exported, made, with_outliers

aten = torch.ops.aten


def export(model: torch.nn.Module) -> ExportedProgram:
    return exported(model, dynamic_shapes={"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}})


@cache
def program() -> ExportedProgram:
    return export(made(Decoder(layers=2), dtype=torch.float32))


@cache
def outlying() -> ExportedProgram:
    """The same with two channels of the stream far above the others, as language models have them."""
    model = with_outliers(made(Decoder(layers=2), dtype=torch.float32))
    return export(model)


def inputs(count: int = 4) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, VOCAB, (2, SEQ), generator=generator),) for _ in range(count)]


def nodes(ep: ExportedProgram, name: str) -> list[torch.fx.Node]:
    return [n for n in ep.graph.nodes if str(n.target).startswith(f"spinpass.{name}")]


def error(before: ExportedProgram, after: ExportedProgram) -> float:
    pairs = [(run(before, x)[0], run(after, x)[0]) for x in inputs(3)]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def test_constants_are_what_their_integers_stand_for() -> None:
    source = program()
    kept = {name: t.clone() for name, t in source.state_dict.items()}
    result = quantize(source, "w4-rtn-asym")
    assert len(result.report.weights) == 14
    for name, weight in result.report.weights.items():
        assert torch.equal(result.program.state_dict[name], weight.codes.dequantized()), name
        assert 0 < weight.error < 0.05
    assert all(torch.equal(t, source.state_dict[name]) for name, t in kept.items()), "the input program was changed"
    untouched = set(kept) - set(result.report.weights)
    assert {"embed.weight", "head.weight"} <= untouched
    assert all(torch.equal(kept[name], result.program.state_dict[name]) for name in untouched)


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


def test_roundings_do_what_they_say() -> None:
    x = torch.randn(3, 5, 16)
    for bits in (4, 8):
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        y = torch.ops.spinpass.round_tokens(x, bits, True)
        assert ((y - x).abs() <= step / 2 + 1e-6).all()
        assert torch.allclose(y, torch.ops.spinpass.round_tokens(y, bits, True), atol=1e-6)
        span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        z = torch.ops.spinpass.round_tokens(x, bits, False)
        assert ((z - x).abs() <= span / (2**bits - 1) + 1e-6).all()
    assert (torch.ops.spinpass.round_tokens(torch.zeros(2, 4), 4, False) == 0).all()
    half = torch.ops.spinpass.round_tokens(x.bfloat16(), 8, True)
    assert half.dtype == torch.bfloat16 and half.stride() == x.stride()


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


def test_a_static_range_gives_up_an_outlier_for_the_rest() -> None:
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    x[0, 7] = 9.0
    scheme = Activations(4, static=True, symmetric=True, sinks=False)
    found = static_range([x], scheme)
    assert float(found.scale) * 15 / 2 < 6 and math.isinf(found.limit)
    whole = static_range([x], replace(scheme, calibration="minmax"))
    assert float(whole.scale) == pytest.approx(18 / 15)
    errors = [(torch.ops.spinpass.round_tensor(x, r.scale, r.zero, 4) - x).square().sum() for r in (found, whole)]
    assert errors[0] < errors[1]
    share = static_range([x], replace(scheme, calibration="percentile", percentile=99.0))
    assert float(share.scale) * 15 / 2 == pytest.approx(float(x.abs().flatten().quantile(0.995)), rel=0.05)


def test_a_massive_token_is_scaled_into_the_range_of_the_others() -> None:
    x = torch.randn(6, 64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 200
    found = static_range(list(x), Activations(8, static=True))
    assert 3 < found.limit < 7
    rounded = torch.ops.spinpass.round_rows(x, found.scale, found.zero, found.limit, 8)
    relative = ((rounded - x).square().sum(-1) / x.square().sum(-1)).sqrt()
    assert float(relative.max()) < 0.02, "the massive tokens and the others alike"
    without = static_range(list(x), Activations(8, static=True, sinks=False))
    assert math.isinf(without.limit) and float(without.scale) > 20 * float(found.scale)
    even = static_range(list(x[:, 1:]), Activations(8, static=True))
    assert math.isinf(even.limit), "no token stands out: a maximum per token would be wasted"


@pytest.mark.parametrize("calibration", ["mse", "percentile", "minmax"])
def test_every_channel_may_have_its_own_static_range(calibration: Any) -> None:
    x = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 16)
    whole, each = (static_range(list(x), Activations(8, static=True, calibration=calibration, per_channel=p)) for p in (False, True))
    assert each.scale.shape == each.zero.shape == (16,) and whole.scale.shape == () and math.isinf(each.limit)
    relative = [
        ((torch.ops.spinpass.round_tensor(x, r.scale, r.zero, 8) - x).square().sum((0, 1)) / x.square().sum((0, 1))).amax()
        for r in (whole, each)
    ]
    assert relative[0] > 0.9, "the small channels are lost in one range"
    assert relative[1] < 1e-2


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


def test_a_weight_that_follows_the_unquantized_program_ends_nearer_to_it() -> None:
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
    assert len(result.report.weights) == 14 and "it is a rotation" in result.report.kept.values()


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="per_channel need ranges that are known before: static=True"):
        Activations(8, per_channel=True)
    with pytest.raises(ConfigError, match="calibration inputs"):
        quantize(program(), "w4")
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantize(program(), QuantizationConfig(weights=Weights(method="rtn"), exclude=("*",)))
    with pytest.raises(ConfigError):
        quantize(program(), "a8static", [(torch.zeros(1), 1, 2)])
    assert QuantizationConfig(cache=Cache(8)).cache == Cache(8)

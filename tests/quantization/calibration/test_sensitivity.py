"""What rounding a layer is said to cost is what it costs: the divergence, measured with that layer alone rounded."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.execution.interpreter import run
from spinpass.quantization import QuantizationConfig, Weights, quantize
from spinpass.quantization.calibration import sensitivity
from spinpass.quantization.calibration.allocate import allocated
from spinpass.quantization.calibration.sensitivity import sensitivities
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made
from tests.support.quantizable import inputs, outlying, program

HOW = Weights(3, method="rtn")
PARTS = ("attn.q", "attn.v", "mlp.down")
NAMES = [f"blocks.{block}.{part}.weight" for block in (0, 1) for part in PARTS]


def divergence(before: ExportedProgram, after: ExportedProgram) -> float:
    """KL per token, in nats."""
    total = 0.0
    for ids in inputs(16):
        wanted, found = (torch.log_softmax(run(p, ids)[0].double(), -1) for p in (before, after))
        total += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return total / 16


@cache
def measured(source: ExportedProgram, name: str, bits: int) -> float:
    config = QuantizationConfig(None, overrides={name: replace(HOW, bits=bits)})
    return divergence(source, quantize(source, config).program)


def costs(source: ExportedProgram) -> dict[str, dict[int, float]]:
    found = sensitivities(source, HOW, NAMES, inputs(64))
    return {name: dict(layer.costs) for name, (layer,) in found.items()}


def off_by(source: ExportedProgram) -> list[float]:
    """The cost as predicted over that measured, of layers at 3 bits."""
    return sorted(found[3] / measured(source, name, 3) for name, found in costs(source).items())


@pytest.mark.parametrize(("source", "most"), [(program, 2.5), (outlying, 4.0)])
def test_the_cost_of_a_layer_is_the_divergence_of_rounding_it(source: Any, most: float) -> None:
    """Of the outlying one some layers at 3 bits lose a tenth of a nat, which is more than second order knows of."""
    ratios = off_by(source())
    assert len(ratios) == len(NAMES)
    assert ratios[0] > 0.4 and ratios[-1] < most and 0.7 < ratios[len(ratios) // 2] < 2


def test_costs_without_the_curvature_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of outputs alone, however it is scaled, does not say what layers cost."""
    monkeypatch.setattr(sensitivity, "curvature", lambda tokens, _: torch.ones(math.prod(tokens)))
    ratios = off_by(program())
    assert ratios[-1] / ratios[0] > 2.5 / 0.4


def test_costs_add_up() -> None:
    everything = quantize(program(), QuantizationConfig(None, overrides={name: replace(HOW, bits=4) for name in NAMES}))
    total = sum(found[4] for found in costs(program()).values())
    assert 0.6 < total / divergence(program(), everything.program) < 1.6


def test_groups_of_a_layer_have_costs_of_their_own() -> None:
    how, name = Weights(3, 16, method="rtn"), "blocks.0.mlp.up.weight"
    found = sensitivities(program(), how, [name, NAMES[0]], inputs(), by_group=[name])
    assert [layer.size for layer in found[name]] == [40 * 16, 40 * 8] and len(found[NAMES[0]]) == 1
    assert all(layer.costs[2] > layer.costs[4] > layer.costs[8] > 0 for layer in found[name])


def test_groups_share_what_their_layer_costs_under_gptq() -> None:
    """Their own errors under GPTQ, which makes up for one in the next, add up to something else."""
    how, name = Weights(3, 16, method="gptq"), "blocks.0.mlp.up.weight"
    (layer,) = sensitivities(program(), how, [name], inputs())[name]
    groups = sensitivities(program(), how, [name], inputs(), by_group=[name])[name]
    nearest = sensitivities(program(), replace(how, method="rtn"), [name], inputs(), by_group=[name])[name]
    for bits in (2, 3, 4):
        assert sum(group.costs[bits] for group in groups) == pytest.approx(layer.costs[bits])
        ratios = [group.costs[bits] / alone.costs[bits] for group, alone in zip(groups, nearest)]
        assert ratios[0] == pytest.approx(ratios[1])


def test_a_token_that_no_prediction_depends_on_does_not_count() -> None:
    gradient = torch.zeros(1, 3, 6)
    gradient[0, 0] = 2.0
    assert sensitivity.curvature((1, 3), gradient).tolist() == [4.0, 0.0, 0.0]
    elsewhere = sensitivity.curvature((1, 3), gradient.transpose(1, 2))
    assert elsewhere.tolist() == pytest.approx([float(gradient.square().mean())] * 3)


class TwoHeads(nn.Module):
    """``aside``: a layer whose result is returned, and which the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = made(Decoder(layers=1), dtype=torch.float32)
        self.aside, self.last = nn.Linear(VOCAB, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder(ids)
        return logits, self.last(self.aside(logits))


def test_layers_that_the_logits_do_not_depend_on_get_the_fewest_bits() -> None:
    torch.manual_seed(0)
    config = QuantizationConfig.parse("w3.0-rtn")
    chosen = allocated(exported(TwoHeads()), config, inputs())
    bits = {name: weights.bits for name, weights in chosen.overrides.items() if weights is not None}
    assert bits["aside.weight"] == 2 < max(bits.values())


def test_the_program_is_not_changed() -> None:
    before = {name: t.detach().clone() for name, t in program().state_dict.items()}
    costs(program())
    assert all(torch.equal(t, program().state_dict[name]) for name, t in before.items())
    assert all(t.grad is None for t in program().state_dict.values())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(VOCAB, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.up(self.embed(ids))).argmax(-1)


def test_a_program_without_logits_is_refused() -> None:
    torch.manual_seed(0)
    source = exported(Classifier())
    with pytest.raises(ConfigError, match="logits are needed"):
        sensitivities(source, HOW, ["up.weight"], inputs(2))
    with pytest.raises(ConfigError, match="the inputs do not fit the program"):
        sensitivities(source, HOW, ["up.weight"], [(torch.zeros(2, SEQ), 1, 2)])
    assert sensitivities(source, HOW, [], []) == {}

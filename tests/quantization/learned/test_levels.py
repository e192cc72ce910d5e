"""Scales in front of Hadamards: the closed form, the function stays, and channels that predictions see round better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spinpass
from spinpass import RotationConfig
from spinpass.certificate.programs import synthetic_inputs
from spinpass.execution import run
from spinpass.graph import with_other_values
from spinpass.learned import balance, with_balanced_channels
from spinpass.quantization import QuantizationConfig, channel_scales
from spinpass.quantization.learned.levels import levelled
from spinpass.rotations import Rotation
from tests.support.decoders import Decoder, made, relative_error
from tests.support.programs import program as decoder
from tests.support.quantizable import divergences, export

ONLINE = RotationConfig(form="online")


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_is_the_minimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, gradients = torch.rand(2, 16, generator=generator, dtype=torch.float64) + 0.1
    scales = levelled(values, gradients)
    values, gradients = values + 1e-3 * values.mean(), gradients + 1e-3 * gradients.mean()

    def cost(d: torch.Tensor) -> float:
        return float((values * d.square()).sum() * (gradients / d.square()).sum())

    assert float(scales.log().sum()) == pytest.approx(0, abs=1e-12)
    assert cost(scales) == pytest.approx(float((values * gradients).sqrt().sum() ** 2))
    assert cost(scales) < cost(torch.ones(16, dtype=torch.float64))
    for k in range(20):
        other = torch.randn(16, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        assert cost(scales * (0.1 * other).exp()) >= cost(scales) * (1 - 1e-12)
    wide = levelled(torch.logspace(0, -9, 16, dtype=torch.float64), torch.logspace(-9, 0, 16, dtype=torch.float64))
    assert float(wide.max() / wide.min()) <= 12 * (1 + 1e-12)


class Readers(nn.Module):
    """One linear layer behind a norm, and a head: the gradient in front of the layer is known by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.n = nn.Embedding(40, 16), nn.RMSNorm(16, elementwise_affine=False)
        self.d = nn.Linear(16, 16, bias=False)
        self.h = nn.Linear(16, 40, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.e(ids)
        x = x + self.d(self.n(x))
        return self.h(self.n(x))  # type: ignore[no-any-return]


def test_moments_are_of_values_and_gradients_in_front_of_the_hadamards() -> None:
    """The gradient over all labels, by autograd on the module; a draw over many inputs comes near to it."""
    model = Readers()
    ids = torch.randint(0, 40, (1, 512), generator=torch.Generator().manual_seed(1))
    program = torch.export.export(model, (ids,), strict=True)
    plan = spinpass.plan(program, ONLINE)
    names = [space.name for space in plan.spaces if space.group == "invertible"]
    assert len(names) == 2
    begun = {space.name: space.rotation for space in plan.spaces}
    found = channel_scales(spinpass.transform(program, ONLINE), begun, [(ids,)] * 40)

    x0 = model.e(ids).detach()
    first = model.n(x0).requires_grad_()
    second = model.n(x0 + model.d(first))
    second.retain_grad()
    logits = torch.log_softmax(model.h(second), -1)
    expected = {}
    sums = {value: [torch.zeros(16), torch.zeros(16)] for value in (0, 1)}
    for label in range(40):
        gradients = torch.autograd.grad(logits[..., label].sum(), (first, second), retain_graph=True)
        weight = logits[..., label].detach().exp()[..., None]
        for place, (value, gradient) in enumerate(zip((first, second), gradients, strict=True)):
            x, g = value.detach().square(), gradient.square() * weight
            sums[place][0] += (x * g.sum(-1, keepdim=True)).sum((0, 1))
            sums[place][1] += (g * x.sum(-1, keepdim=True)).sum((0, 1))
    for place, name in enumerate(sorted(names, key=lambda n: "head" in n or n.endswith("h"))):
        expected[name] = levelled(*(each.double() for each in sums[place]))
        torch.testing.assert_close(found[name].given, expected[name], rtol=0.06, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "gemma2", "gpt2", "olmo2"])
def test_the_function_stays(name: str) -> None:
    program = decoder(name)
    before = {n: t.clone() for n, t in program.state_dict.items()}
    config = with_balanced_channels(program, ONLINE, [synthetic_inputs(program, seed=s) for s in range(2)])
    gated = name not in ("gpt_neox", "gpt2")
    assert {name.partition(":")[0] for name in config.matrices} == {"R1", "gates" if gated else "R4"}
    for key, each in config.matrices.items():
        assert isinstance(each, Rotation) and each.kind == ("blocks" if key.startswith("gates") else "scaled-hadamard")
    found = spinpass.rotate(program, config)
    flops = [spinpass.plan(program, each).flops for each in (config, ONLINE)]
    widths = sum(each.size for each in config.matrices.values() if each.kind == "scaled-hadamard")  # type: ignore[union-attr]
    assert flops[0] == flops[1] + widths, "what is folded costs nothing"
    assert found.certificate is not None and found.certificate.ok
    given = synthetic_inputs(program, seed=3)
    assert relative_error(run(program, given), run(found.program, given)) < 1e-9
    assert all(torch.equal(before[n], t) for n, t in program.state_dict.items())
    assert all(t.grad is None for t in program.state_dict.values())


def test_what_is_given_or_takes_no_scales_stays() -> None:
    program = decoder("llama")
    shown: list[Any] = [synthetic_inputs(program, seed=0)]
    for config in (RotationConfig(("R1", "R2")), RotationConfig(("R2", "R3")), RotationConfig("R1", form="offline")):
        assert with_balanced_channels(program, config, shown) is config
    spaces = [s for s in spinpass.plan(program, ONLINE).spaces if s.online and s.role != "R3"]
    own = RotationConfig(form="online", matrices={s.name: torch.eye(s.size).double() for s in spaces})
    assert with_balanced_channels(program, own, shown) is own
    whole = decoder("llama")
    zeros = {n: torch.zeros_like(t) for n, t in whole.state_dict.items() if "down_proj" in n}
    zero = with_other_values(whole, zeros)
    assert not any(n.startswith(("R4", "gates")) for n in with_balanced_channels(zero, ONLINE, shown).matrices)


def unbalanced() -> Any:
    """A decoder whose channels that are large behind norms are those that weights hardly read."""
    model: Any = made(Decoder(layers=2), dtype=torch.float32)
    with torch.no_grad():
        model.embed.weight[:, ::4] *= 8
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up, block.mlp.gate):
                linear.weight[:, ::4] /= 16
    return model


def test_channels_round_better_and_are_kept_where_other_inputs_confirm_it() -> None:
    program = export(unbalanced())
    shown = [synthetic_inputs(program, seed=s) for s in range(4)]
    losses = divergences(program, (ONLINE, with_balanced_channels(program, ONLINE, shown)), "a4")
    assert losses[1] < 0.8 * losses[0]
    found, course = balance(program, ONLINE, QuantizationConfig.parse("a4"), shown[:3], shown[3:])
    assert course.kinds == ("balanced channels",) and course.kept and not course.dropped
    assert {type(each) for each in found.matrices.values()} == {Rotation}
    assert all(not name.startswith("R3") for name in found.matrices)

"""Balanced caches: the closed form is the minimum, the function stays, and keys with few directions round better."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spinpass
from spinpass import RotationConfig
from spinpass.certificate.programs import synthetic_inputs
from spinpass.errors import ConfigError
from spinpass.execution import run
from spinpass.graph import with_other_values
from spinpass.learned import balance, with_balanced_keys
from spinpass.quantization import QuantizationConfig
from spinpass.quantization.learned.balance import balanced
from tests.support.decoders import HEAD, Decoder, made, relative_error
from tests.support.programs import program as decoder
from tests.support.quantizable import divergences, export

CACHES = RotationConfig(("R2", "R3"))


def moments(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    slopes = torch.logspace(0, -2, 12, dtype=torch.float64)
    return parts[0] * slopes @ parts[0].t(), parts[1] * slopes @ parts[1].t()


def cost(keys: torch.Tensor, queries: torch.Tensor, basis: torch.Tensor) -> float:
    inverse = torch.linalg.inv(basis)
    return float((basis.t() @ keys @ basis).trace() * (inverse @ queries @ inverse.t()).trace())


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_is_the_minimum(seed: int) -> None:
    keys, queries = moments(seed)
    basis = balanced(keys, queries)
    floor = 1e-3 / 12 * torch.eye(12, dtype=torch.float64)
    keys, queries = keys + float(keys.trace()) * floor, queries + float(queries.trace()) * floor
    turned, inverse = basis.t() @ keys @ basis, torch.linalg.inv(basis)
    dual = inverse @ queries @ inverse.t()
    scale = float(turned.trace() / dual.trace())
    torch.testing.assert_close(turned, torch.diag(turned.diag()), rtol=0, atol=1e-9 * float(turned.trace()))
    torch.testing.assert_close(turned, dual * scale)
    assert float(turned.trace()) == pytest.approx(float(keys.trace()))
    least = cost(keys, queries, basis)
    values = torch.linalg.eigvals(keys @ queries).real
    assert least == pytest.approx(float(values.clamp_min(0).sqrt().sum() ** 2))
    assert least < cost(keys, queries, torch.eye(12, dtype=torch.float64))
    for k in range(20):
        other = basis @ (torch.eye(12) + 0.05 * torch.randn(12, 12, generator=torch.Generator().manual_seed(k))).double()
        assert cost(keys, queries, other) >= least * (1 - 1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "gemma2"])
def test_the_function_stays(name: str) -> None:
    program = decoder(name)
    before = {n: t.clone() for n, t in program.state_dict.items()}
    config = with_balanced_keys(program, CACHES, [synthetic_inputs(program, seed=s) for s in range(2)])
    assert {name.partition(":")[0] for name in config.matrices} == {"R3"} and len(config.matrices) == 2
    assert not any(rotation.is_orthogonal for rotation in config.matrices.values())  # type: ignore[union-attr]
    found = spinpass.rotate(program, config)
    assert found.certificate is not None and found.certificate.ok
    given = synthetic_inputs(program, seed=3)
    assert relative_error(run(program, given), run(found.program, given)) < 1e-9
    assert all(torch.equal(before[n], t) for n, t in program.state_dict.items())


def test_what_is_given_or_cannot_be_balanced_stays() -> None:
    shown: list[Any] = [synthetic_inputs(decoder("llama"), seed=0)]
    own = RotationConfig(("R2", "R3"), matrices={"R3": torch.eye(int(spinpass.plan(decoder("llama"), CACHES).spaces[-1].size)).double()})
    for config in (own, RotationConfig(("R1", "R2"))):
        assert with_balanced_keys(decoder("llama"), config, shown) is config
    for nothing in ("gpt2", "bloom"):  # queries and keys meet without RoPE, so that they fold, or not at all
        assert with_balanced_keys(decoder(nothing), CACHES, [synthetic_inputs(decoder(nothing), seed=0)]) is CACHES
    whole = decoder("llama")
    zeros = {n: torch.zeros_like(t) for n, t in whole.state_dict.items() if "k_proj" in n}
    zero = with_other_values(whole, zeros)
    assert not with_balanced_keys(zero, CACHES, [synthetic_inputs(zero, seed=0)]).matrices


def test_keys_of_few_directions_round_better() -> None:
    model: Any = made(Decoder(layers=2), dtype=torch.float32)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.k.weight.view(-1, HEAD, block.attn.k.in_features)[:, HEAD // 4 : HEAD // 2] *= 8
            block.attn.k.weight.view(-1, HEAD, block.attn.k.in_features)[:, 3 * HEAD // 4 :] *= 8
            block.attn.q.weight.view(-1, HEAD, block.attn.q.in_features)[:, HEAD // 4 : HEAD // 2] /= 4
            block.attn.q.weight.view(-1, HEAD, block.attn.q.in_features)[:, 3 * HEAD // 4 :] /= 4
    program = export(model)
    shown = [synthetic_inputs(program, seed=s) for s in range(4)]
    losses = divergences(program, (CACHES, with_balanced_keys(program, CACHES, shown)), "kv4")
    assert losses[1] < 0.8 * losses[0]


def test_it_is_kept_where_other_inputs_confirm_it() -> None:
    program = decoder("llama")
    shown: list[Any] = [synthetic_inputs(program, seed=seed) for seed in range(4)]
    scheme = QuantizationConfig.parse("w4-rtn-kv4")
    found, course = balance(program, CACHES, scheme, shown, None)
    assert course.inputs == 1 and course.kept is bool(found.matrices) is (course.after < course.before or course.kept)
    with pytest.raises(ConfigError, match="two or more"):
        balance(program, CACHES, scheme, shown[:1], None)
    with pytest.raises(ConfigError, match="the scheme rounds neither"):
        balance(program, CACHES, QuantizationConfig.parse("w4-rtn"), shown, None)
    with pytest.raises(ConfigError, match="nothing of this program can be balanced"):
        balance(program, RotationConfig("R2"), scheme, shown, None)

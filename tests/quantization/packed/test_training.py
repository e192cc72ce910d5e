"""Fine-tuning of packed programs: gradients against autograd of the same arithmetic, losses that fall, and a packed result."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import ConfigError
from spinpass.execution.interpreter import run
from spinpass.operators.packed_linear import round_weight
from spinpass.operators.words import pack_words
from spinpass.quantization import QuantizationConfig, Quantized, Weights, quantize
from spinpass.quantization.packed.program import pack
from spinpass.quantization.packed.training import Trainable
from spinpass.quantization.rounding.grid import rounded
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made
from tests.support.matrices import normal
from tests.support.modules import Twice

IDS = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "quantize.md"
UP = "blocks.0.mlp.up"


def export(dtype: torch.dtype = torch.float32, **settings: Any) -> ExportedProgram:
    return exported(made(Decoder(layers=1, hidden=32, ffn=48, kv=4, bias=True, **settings), dtype=dtype))


@cache
def program() -> ExportedProgram:
    return export()


@cache
def quantized(scheme: str = "w2g16-rtn-asym") -> Quantized:
    return quantize(program(), scheme)


@cache
def packed(scheme: str = "w2g16-rtn-asym") -> ExportedProgram:
    return pack(quantized(scheme)).program


# -- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_gradients_are_straight_through(ordered: bool) -> None:
    """Against autograd of the same formula, its rounding replaced by one with a gradient of 1."""
    bits, out, columns = 3, 8, 64
    codes = rounded(normal(out, columns), Weights(bits, 16, symmetric=False, method="rtn"))
    at = codes.group_of if ordered else torch.randperm(columns, generator=torch.Generator().manual_seed(1)) // 16
    scales, weight, upstream = codes.scales.double(), 1.5 * normal(out, columns).double(), normal(out, columns, seed=4)
    ours, theirs = ([t.clone().requires_grad_() for t in (weight, scales)] for _ in range(2))
    qzeros = pack_words(codes.zeros.T, bits, 1)
    g_idx = None if ordered else at.int()
    result = torch.ops.spinpass.round_weight(ours[0], ours[1].T, qzeros, g_idx, bits)
    step, zero = theirs[1][:, at], codes.zeros.double()[:, at]
    ratio = theirs[0] / step + zero
    outside = (ratio.round() < 0) | (ratio.round() > 2**bits - 1)
    ends = ratio.detach().round().clamp(0, 2**bits - 1)  # the gradient of clamp at its ends differs between versions of torch
    through = torch.where(outside, ends, ratio + (ratio.round() - ratio).detach())
    expected = (through - zero) * step
    assert torch.equal(result, expected)
    assert outside.any() and not outside.all()
    result.backward(upstream.double())
    expected.backward(upstream.double())
    assert ours[0].grad is not None and (ours[0].grad[outside] == 0).all()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


def test_the_op_passes_torchs_own_checks_of_operators() -> None:
    codes = rounded(normal(8, 32), Weights(4, 16, symmetric=False, method="rtn"))
    arguments = (
        normal(8, 32).requires_grad_(),
        codes.scales.T.contiguous().requires_grad_(),
        pack_words(codes.zeros.T, 4, 1),
        None,
        4,
    )
    torch.library.opcheck(
        round_weight, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_it_begins_as_the_packed_program_and_gives_it_back(frozen: bool) -> None:
    module = Trainable(packed(), frozen=frozen)
    expected = run(packed(), (IDS,))[0]
    assert torch.equal(module(IDS), expected)
    again = module.packed()
    assert torch.equal(run(again, (IDS,))[0], expected)
    assert all(torch.equal(t, again.state_dict[name]) for name, t in packed().state_dict.items())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scheme", ["w2g16-rtn-asym", "w3g16-rtn"])
def test_the_loss_falls_and_the_packed_result_computes_what_was_trained(frozen: bool, scheme: str) -> None:
    """Distillation of the float program: 20 steps on the inputs whose outputs it should return."""
    source = packed(scheme)
    before = {name: t.clone() for name, t in source.state_dict.items()}
    latent = None if frozen else {n: program().state_dict[n].detach() for n in quantized(scheme).report.weights}
    module = Trainable(source, latent=latent, frozen=frozen).train()
    teacher = run(program(), (IDS,))[0]
    weights = [p for n, p in module.graph.named_parameters() if p.requires_grad and n.endswith(".weight")]
    scales = [p for n, p in module.graph.named_parameters() if p.requires_grad and n.endswith(".scales")]
    assert len(scales) == 7 and len(weights) == (0 if frozen else 7)
    groups = [{"params": scales, "lr": 1e-3}, {"params": weights, "lr": 3e-3}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]])
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(module(IDS), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0], losses
    result = module.packed()
    assert torch.equal(run(result, (IDS,))[0], module(IDS).detach())
    moved = {name for name, t in before.items() if not torch.equal(t, result.state_dict[name])}
    assert {name.rsplit(".", 1)[1] for name in moved} == ({"scales"} if frozen else {"scales", "qweight"})
    assert all(torch.equal(t, source.state_dict[name]) for name, t in before.items()), "the program was changed"


def test_gradients_of_frozen_scales_are_those_of_the_dequantized_program() -> None:
    module = Trainable(packed(), frozen=True)
    upstream = normal(2, SEQ, VOCAB, seed=8)
    module(IDS).backward(upstream)
    simulated = quantized().program.module()
    weight = dict(simulated.named_parameters())[f"{UP}.weight"].requires_grad_()
    simulated(IDS).backward(upstream)
    codes = quantized().report.weights[f"{UP}.weight"].codes
    assert weight.grad is not None
    terms = weight.grad * (codes.q.float() - codes.zeros.float()[:, codes.group_of])
    expected = terms.unflatten(1, (-1, 16)).sum(-1).T
    found = dict(module.graph.named_parameters())[f"{UP}.scales"].grad
    assert found is not None and torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_pass_roundings_of_activations() -> None:
    x = normal(3, 16).requires_grad_()
    upstream = normal(3, 16, seed=1)
    torch.ops.spinpass.round_tokens(x, 4, False).backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)
    x.grad = None
    scale, zero = torch.tensor(0.1), torch.tensor(8.0)
    torch.ops.spinpass.round_tensor(x, scale, zero, 4).backward(upstream)
    within = ((x / scale).round() >= -8) & ((x / scale).round() <= 7)
    assert x.grad is not None and torch.equal(x.grad, upstream * within) and not within.all() and within.any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_stop_where_a_range_is_cut(symmetric: bool) -> None:
    x = normal(3, 16).requires_grad_()
    torch.ops.spinpass.round_tokens(x, 4, symmetric, 0.5).backward(torch.ones(3, 16))
    high, low = x.detach().amax(-1, keepdim=True), x.detach().amin(-1, keepdim=True)
    bound = 0.5 * torch.maximum(high, -low)
    within = x.abs() <= bound if symmetric else (x <= 0.5 * high) & (x >= 0.5 * low)
    assert x.grad is not None and torch.equal(x.grad, within.float()) and not within.all() and within.any()


def test_gradients_pass_tokens_that_are_scaled_into_the_range() -> None:
    x = normal(3, 16)
    x[1] *= 50
    x.requires_grad_()
    torch.ops.spinpass.round_rows(x, torch.tensor(0.05), torch.tensor(128.0), 4.0, 8).backward(torch.ones(3, 16))
    assert x.grad is not None and bool((x.grad == 1).all()), "the massive token is covered as well"
    x.grad = None
    torch.ops.spinpass.round_tensor(x, torch.tensor(0.05), torch.tensor(128.0), 8).backward(torch.ones(3, 16))
    assert x.grad is not None and float(x.grad[1].mean()) < 0.5


@pytest.mark.parametrize("scheme", ["w4g16-rtn-a8-kv4", "w4g16-rtn-a8static"])
def test_programs_with_rounded_activations_are_trained(scheme: str) -> None:
    module = Trainable(pack(quantize(program(), scheme, [(IDS,)])).program)
    moving = [p for p in module.parameters() if p.requires_grad]
    with torch.no_grad():  # on the grid itself no scale is better than another
        for parameter in moving[1::2]:
            parameter.add_(0.01 * normal(*parameter.shape))
    module(IDS).square().sum().backward()
    assert len(moving) == 14 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in moving)


def test_the_passage_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden=32, ffn=64, kv=4, heads=4)
    source = exported(made(Decoder(layers=1, **sizes), dtype=torch.float32))
    rotated = spinpass.transform(source, spinpass.RotationConfig(form="online"))
    names: dict[str, Any] = {"rotated": rotated, "result": quantize(rotated, "w4g16-a8-kv4", [(IDS,)])}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (passage,) = (b for b in blocks if "write_gptq" in b)
    exec(passage, names)
    assert (tmp_path / "folder" / "model.safetensors").is_file()
    for name in names["result"].report.weights:
        stored, simulated = names["program"].state_dict[name], names["result"].program.state_dict[name]
        assert torch.allclose(stored, simulated, rtol=2**-11)
    assert torch.equal(run(names["packed"], (IDS,))[0], run(names["result"].program, (IDS,))[0])
    assert torch.equal(run(names["unpack"](names["packed"]), (IDS,))[0], run(names["packed"], (IDS,))[0])


def test_other_parameters_move_when_asked() -> None:
    module = Trainable(packed())
    norm = dict(module.graph.named_parameters())["norm.weight"]
    assert not norm.requires_grad
    with torch.no_grad():
        norm.mul_(2)
    result = module.packed()
    assert torch.equal(result.state_dict["norm.weight"], 2 * packed().state_dict["norm.weight"])
    assert torch.equal(run(result, (IDS,))[0], module(IDS).detach())


def test_half_programs_are_trained_in_float32_and_tied_tables_stay_tied() -> None:
    half = pack(quantize(export(torch.bfloat16, tied=True), "w4g16-rtn")).program
    module = Trainable(half)
    assert dict(module.graph.named_parameters())[f"{UP}.weight"].dtype == torch.float32
    assert torch.equal(module(IDS), run(half, (IDS,))[0])
    module(IDS).sum().backward()
    state = module.packed().state_dict
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


def test_a_shared_weight_is_rounded_once() -> None:
    torch.manual_seed(0)
    how = Weights(4, method="rtn")
    made_of = quantize(torch.export.export(Twice(), (normal(2, 32),)), QuantizationConfig(how, head=how))
    module = Trainable(pack(made_of).program)
    assert sum("round_weight" in str(n.target) for n in module.graph.graph.nodes) == 2
    assert torch.equal(module(normal(2, 32)), run(made_of.program, (normal(2, 32),))[0])


def test_what_cannot_be_trained_says_why() -> None:
    with pytest.raises(ConfigError, match="no packed linear layer"):
        Trainable(program())
    weight = program().state_dict[f"{UP}.weight"]
    with pytest.raises(ConfigError, match=r"x\.weight is the weight of no packed layer; those are blocks"):
        Trainable(packed(), latent={"x.weight": weight})
    with pytest.raises(ConfigError, match=r"up\.weight is \[32, 48\], and its layer takes \[48, 32\]"):
        Trainable(packed(), latent={f"{UP}.weight": weight.T})
    with pytest.raises(ConfigError, match="give one of the two"):
        Trainable(packed(), latent={f"{UP}.weight": weight}, frozen=True)
    module = Trainable(packed())
    with torch.no_grad():
        dict(module.graph.named_parameters())[f"{UP}.scales"][0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"up\.scales has become zero or not finite"):
        module.packed()

"""Packed programs: the op computes what the simulated constants do, constants are small, and there is a way back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ConfigError, QuantizedWeightError
from spinpass.execution.interpreter import run
from spinpass.operators.packed_linear import dequantized, packed_linear
from spinpass.operators.words import pack_words
from spinpass.quantization import QuantizationConfig, Quantized, Weights, quantize
from spinpass.quantization.packed.program import pack, unpack
from spinpass.quantization.report import QuantizedWeight
from spinpass.quantization.rounding.grid import Codes, rounded
from tests.support.decoders import SEQ, VOCAB, Decoder, exported, made
from tests.support.matrices import normal
from tests.support.modules import Twice

IDS = torch.randint(VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))
SIZES = dict(layers=1, hidden=32, ffn=48, kv=4, bias=True)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    dynamic = {"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    return exported(made(Decoder(**SIZES), dtype=torch.float32), dynamic_shapes=dynamic)


def layers(ep: ExportedProgram) -> list[Any]:
    return [n for n in ep.graph.nodes if n.target is torch.ops.spinpass.packed_linear.default]


def logits(ep: ExportedProgram) -> Tensor:
    return run(ep, (IDS,))[0]  # type: ignore[no-any-return]


def shuffled(quantized: Quantized, name: str) -> Quantized:
    """The same weight with groups of any columns, in the program and in the report."""
    weight = quantized.report.weights[name]
    columns = weight.codes.q.shape[1]
    index = torch.randperm(columns, generator=torch.Generator().manual_seed(5)) // 16
    codes = replace(weight.codes, index=index)
    with torch.no_grad():
        quantized.program.state_dict[name].copy_(codes.dequantized())
    weights = {**quantized.report.weights, name: replace(weight, codes=codes)}
    return replace(quantized, report=replace(quantized.report, weights=weights))


# -- the operator -----------------------------------------------------------------------------------------------------


def operands(codes: Codes) -> tuple[Any, ...]:
    index = None if codes.index is None else codes.index.int()
    bits = codes.bits
    return pack_words(codes.q.T, bits, 0), codes.scales.T.contiguous(), pack_words(codes.zeros.T, bits, 1), index


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["groups", "channel", "any order", "odd sizes"])
def test_the_op_multiplies_by_the_values_of_the_codes(bits: int, kind: str) -> None:
    out, columns = (7, 40) if kind == "odd sizes" else (16, 64)
    scheme = Weights(bits, None if kind == "channel" else 16, symmetric=False, method="rtn")
    codes = rounded(normal(out, columns), scheme)
    if kind == "any order":
        codes = replace(codes, index=torch.randperm(columns) // 16)
    x, bias = normal(2, 3, columns, seed=1), normal(out, seed=2)
    assert torch.equal(dequantized(*operands(codes), bits, columns), codes.dequantized())
    made_of = torch.ops.spinpass.packed_linear(x, *operands(codes), bias, bits)
    assert torch.equal(made_of, nn.functional.linear(x, codes.dequantized(), bias))
    half = torch.ops.spinpass.packed_linear(x.bfloat16(), *operands(codes), None, bits)
    assert torch.equal(half, nn.functional.linear(x.bfloat16(), codes.dequantized().bfloat16()))


def test_the_op_passes_torchs_own_checks_of_operators() -> None:
    codes = rounded(normal(8, 32), Weights(4, 16, symmetric=False, method="rtn"))
    qweight, scales, qzeros, _ = operands(codes)
    arguments = (normal(2, 32).requires_grad_(), qweight, scales.requires_grad_(), qzeros, None, None, 4)
    torch.library.opcheck(
        packed_linear, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize("kind", ["groups", "any order"])
def test_gradients_are_those_of_the_dequantized_form(kind: str) -> None:
    codes = rounded(normal(8, 64), Weights(4, 16, symmetric=False, method="rtn"))
    if kind == "any order":
        codes = replace(codes, index=torch.randperm(64) // 16)
    codes = replace(codes, scales=codes.scales.double())
    leaves = [normal(3, 5, 64, seed=1).double(), codes.scales.clone(), normal(8, seed=2).double()]
    ours, theirs = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    qweight, _, qzeros, g_idx = operands(codes)
    upstream = normal(3, 5, 8, seed=4).double()
    made_of = torch.ops.spinpass.packed_linear(ours[0], qweight, ours[1].T, qzeros, g_idx, ours[2], 4)
    made_of.backward(upstream)
    at = codes.group_of
    weight = (codes.q.double() - codes.zeros.double()[:, at]) * theirs[1][:, at]
    nn.functional.linear(theirs[0], weight, theirs[2]).backward(upstream)
    for a, b in zip(ours, theirs):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4g16-rtn", "w3-rtn-asym", "w2g16-rtn-asym", "w8-rtn-a8-kv4-head8"])
def test_a_packed_program_computes_what_the_simulated_one_does(program: ExportedProgram, scheme: str) -> None:
    quantized = quantize(program, scheme)
    before = {name: t.clone() for name, t in quantized.program.state_dict.items()}
    packed = pack(quantized)
    assert not packed.kept and len(layers(packed.program)) == len(quantized.report.weights)
    assert torch.equal(logits(packed.program), logits(quantized.program))
    assert all(torch.equal(t, quantized.program.state_dict[name]) for name, t in before.items()), "input changed"
    state = packed.program.state_dict
    assert not set(quantized.report.weights) & set(state)
    saved = sum(before[n].nbytes - w.codes.nbytes for n, w in quantized.report.weights.items())
    # which counts the scales as a file stores them
    beside = sum(state[n].nbytes for n in state if n.endswith((".qzeros", ".scales")))
    assert sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in state.values()) >= saved - beside


def test_groups_of_any_columns_are_packed(program: ExportedProgram) -> None:
    quantized = shuffled(quantize(program, "w4g16-rtn"), "blocks.0.mlp.up.weight")
    packed = pack(quantized).program
    assert [n for n in packed.state_dict if n.endswith("g_idx")] == ["blocks.0.mlp.up.g_idx"]
    assert torch.equal(logits(packed), logits(quantized.program))


def test_half_types_round_once(program: ExportedProgram) -> None:
    half = exported(made(Decoder(**SIZES), dtype=torch.bfloat16))
    quantized = quantize(half, "w4g16-rtn")
    packed = pack(quantized).program
    assert torch.equal(logits(packed), logits(quantized.program))
    assert torch.equal(logits(unpack(packed)), logits(quantized.program))


def test_a_packed_program_is_saved_and_loaded(program: ExportedProgram, tmp_path: Any) -> None:
    packed = pack(quantize(program, "w4g16-rtn")).program
    torch.export.save(packed, tmp_path / "packed.pt2")
    again = torch.export.load(tmp_path / "packed.pt2")
    assert torch.equal(logits(again), logits(packed))
    assert torch.equal(packed.module()(IDS), logits(packed))


def test_rotations_and_the_quantizer_refuse_a_packed_program(program: ExportedProgram) -> None:
    packed = pack(quantize(program, "w4g16-rtn")).program
    for refuse in (spinpass.transform, spinpass.plan, lambda p: quantize(p, "w4-rtn")):
        with pytest.raises(QuantizedWeightError, match=r"qweight is a quantized or packed weight .*int32"):
            refuse(packed)
    assert spinpass.verify(packed, packed).ok


def test_unpacking_is_asked_for_and_the_result_is_rotated_and_quantized_again(program: ExportedProgram) -> None:
    quantized = quantize(program, "w8g16-rtn")
    loose = unpack(pack(quantized).program)
    assert torch.equal(logits(loose), logits(quantized.program))
    for name in quantized.report.weights:
        assert torch.equal(loose.state_dict[name], quantized.program.state_dict[name])
    assert set(loose.state_dict) == set(quantized.program.state_dict)
    rotated = spinpass.transform(loose)
    assert torch.allclose(logits(rotated), logits(loose), atol=1e-4)
    again = pack(quantize(rotated, "w8-rtn"))
    assert len(layers(again.program)) == len(quantized.report.weights)
    with pytest.raises(ConfigError, match="no packed linear layer"):
        unpack(loose)


def test_the_record_of_a_rotation_stays(program: ExportedProgram) -> None:
    rotated = spinpass.transform(program)
    packed = pack(quantize(rotated, "w8-rtn-head8")).program
    assert record.read(packed) == record.read(rotated) is not None
    assert record.read(unpack(packed)) == record.read(rotated)


class Spellings(nn.Module):
    """Products with a stored weight in every spelling, and some that are none."""

    def __init__(self) -> None:
        super().__init__()
        for i, name in enumerate(("linear", "matmul", "mm", "addmm", "turned", "scaled", "sliced", "stack", "shared")):
            size = (2, 32, 32) if name == "stack" else (32, 32)
            setattr(self, name, nn.Module())
            getattr(self, name).weight = nn.Parameter(normal(*size, seed=i))
        self.bias = nn.Parameter(normal(32, seed=20))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.linear.weight, self.bias)
        x = x.tanh() @ self.matmul.weight
        x = torch.mm(x.tanh(), self.mm.weight.T)
        x = torch.addmm(self.bias, x.tanh(), self.addmm.weight)
        x = x.tanh() @ self.turned.weight.transpose(0, 1)
        x = torch.addmm(self.bias, x.tanh(), self.scaled.weight, alpha=2)
        x = torch.cat([x.tanh() @ self.sliced.weight[:, :16], x], -1)[:, :32]
        x = torch.einsum("bi,eio->bo", x.tanh(), self.stack.weight)
        y = x.tanh() @ self.shared.weight
        return nn.functional.linear(y + self.shared.weight[0], self.shared.weight)


def test_every_spelling_of_a_product_is_packed_or_says_why_not() -> None:
    source = torch.export.export(Spellings(), (normal(4, 32),), strict=False)
    how = Weights(8, method="rtn")
    quantized = quantize(source, QuantizationConfig(how, head=how))
    packed = pack(quantized)
    assert len(layers(packed.program)) == 5
    assert set(packed.kept) == set(quantized.report.weights) - {
        f"{n}.weight" for n in ("linear", "matmul", "mm", "addmm", "turned")
    }
    assert "no product with the weight as it is stored" in packed.kept["scaled.weight"]
    assert "reads it too" in packed.kept["shared.weight"]
    assert "is that of several matrices" in packed.kept["stack.weight"]
    x = (normal(4, 32, seed=7),)
    expected = run(quantized.program, x)[0]
    assert torch.allclose(run(packed.program, x)[0], expected, rtol=1e-5, atol=1e-4)


def test_a_program_with_nothing_to_pack_says_why(program: ExportedProgram) -> None:
    tables = quantize(program, QuantizationConfig(weights=None, embedding=Weights(8, method="rtn")))
    with pytest.raises(ConfigError, match=r"nothing to pack: embed\.weight: no linear layer reads it"):
        pack(tables)


def test_one_constant_for_layers_that_share_it() -> None:
    torch.manual_seed(0)
    source = torch.export.export(Twice(), (normal(2, 32),))
    quantized = quantize(source, "w4-rtn")
    packed = pack(quantized).program
    assert len(layers(packed)) == 2 and sum(n.endswith("qweight") for n in packed.state_dict) == 1
    loose = unpack(packed)
    assert sorted(loose.state_dict) == sorted(source.state_dict)
    assert torch.equal(run(loose, (normal(2, 32),))[0], run(quantized.program, (normal(2, 32),))[0])


def test_a_weight_that_the_report_lacks_is_not_touched(program: ExportedProgram) -> None:
    quantized = quantize(program, "w4g16-rtn")
    one: dict[str, QuantizedWeight] = {n: w for n, w in quantized.report.weights.items() if n.endswith("up.weight")}
    packed = pack(replace(quantized, report=replace(quantized.report, weights=one)))
    assert len(layers(packed.program)) == 1 and torch.equal(logits(packed.program), logits(quantized.program))

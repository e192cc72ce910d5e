"""Hadamards as linear layers: the same values, the same interface, no op of spinpass left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import ExportError, QuantizedWeightError
from spinpass.graph import op_name
from spinpass.operators import hadamard as library
from spinpass.passes.lower_hadamards import lower_hadamards
from spinpass.rotations import hadamard
from tests.support import models
from tests.support.kronecker import by_factors
from tests.support.programs import program


class Online(nn.Module):
    def __init__(self, order: int, transpose: bool) -> None:
        super().__init__()
        self.order, self.transpose = order, transpose

    def forward(self, x: Tensor) -> Tensor:
        return library.hadamard_op(x, self.order, self.transpose)


def online(order: int, size: int, transpose: bool = False, dtype: torch.dtype = torch.float64) -> ExportedProgram:
    x = torch.zeros(2, 5, size, dtype=dtype)
    return torch.export.export(Online(order, transpose), (x,), dynamic_shapes=({0: Dim("rows"), 1: Dim("columns")},))


def names(ep: ExportedProgram) -> list[str]:
    return [op_name(node) for node in ep.graph.nodes if node.op == "call_function"]


ORDERS = {
    "one factor": (20, 20),
    "two": (576, 576),
    "three": (3072, 3072),
    "blocks": (12, 60),
    "blocks of two": (96, 288),
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order, size", ORDERS.values(), ids=ORDERS)
def test_values_are_those_of_the_op(order: int, size: int, transpose: bool) -> None:
    ep = online(order, size, transpose)
    lowered = lower_hadamards(ep)
    x = torch.randn(3, 4, size, dtype=torch.float64)
    result = lowered.module()(x)
    torch.testing.assert_close(result, hadamard.hadamard_transform(x, order, transpose=transpose), rtol=0, atol=1e-13)
    assert library.HADAMARD not in names(lowered)
    assert names(lowered).count("aten::linear") == len(hadamard.kronecker_factors(order))


@pytest.mark.parametrize("how", ["plain", "cache"])
def test_copies_that_keep_strides_give_way(how: str) -> None:
    """Products with factors on queries and keys, which lie transposed."""
    before = program("llama", how)
    config = spinpass.RotationConfig(rotations="R3", verify=False)
    rotated = spinpass.transform(before, replace(config, matrices=by_factors(before, config)))
    lowered = lower_hadamards(rotated)
    assert names(rotated).count("aten::copy") == names(lowered).count("aten::copy") + 4 == 4
    assert not {"aten::empty_like", "aten::empty_permuted"} & {*names(lowered), *names(lowered.run_decompositions())}
    assert spinpass.verify(before, lowered).ok and record.read(lowered) == record.read(rotated)


class Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x).copy_(x.float())  # of another dtype: more than strides
        return kept.transpose(1, 2).contiguous().view(2, -1) + torch.zeros_like(x).copy_(x).sum()


def test_a_copy_into_another_dtype_stays() -> None:
    ep = torch.export.export(Copied(), (torch.randn(2, 3, 4, dtype=torch.float64),)).run_decompositions({})
    assert names(lower_hadamards(ep)).count("aten::copy") == names(ep).count("aten::copy") == 2


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    x = torch.randn(2, 3, 96).bfloat16()
    result = lower_hadamards(online(96, 96, dtype=torch.bfloat16)).module()(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, hadamard.hadamard_transform(x.double(), 96).bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["llama_tied", "gpt_neox"])
def test_decoders_keep_function_signature_and_record(name: str) -> None:
    rotated = spinpass.transform(program(name, "cache"), spinpass.RotationConfig(kind="random-hadamard", verify=False))
    before = [str(node) for node in rotated.graph.nodes]
    lowered = lower_hadamards(rotated)
    assert library.HADAMARD in names(rotated) and library.HADAMARD not in names(lowered)
    assert [str(node) for node in rotated.graph.nodes] == before, "the program given was changed"
    assert lowered.graph_signature.user_inputs == rotated.graph_signature.user_inputs
    assert len(lowered.graph_signature.user_outputs) == len(rotated.graph_signature.user_outputs)
    assert lowered.range_constraints == rotated.range_constraints
    assert record.read(lowered) == record.read(rotated) is not None
    certificate = spinpass.verify(rotated, lowered)
    assert certificate.ok, certificate
    assert lowered.run_decompositions().graph_signature.user_inputs == lowered.graph_signature.user_inputs


class Transposed(Online):
    def forward(self, x: Tensor) -> Tensor:
        return library.hadamard_op(x.transpose(1, 2), self.order).transpose(1, 2).view(x.shape[0], x.shape[1], -1)


def test_a_view_after_a_hadamard_of_other_strides_still_works() -> None:
    x = torch.randn(2, 5, 3, 96, dtype=torch.float64)
    ep = torch.export.export(Transposed(96, False), (x,))
    assert "aten::view" in names(ep)
    lowered = lower_hadamards(ep)
    torch.testing.assert_close(lowered.module()(x), ep.module()(x), rtol=0, atol=1e-13)


def test_a_program_without_hadamards_comes_back() -> None:
    ep = program("llama_tied")
    assert lower_hadamards(ep) is ep


def test_factors_are_stored_once() -> None:
    rotated = spinpass.transform(program("llama_tied"), spinpass.RotationConfig(rotations=("R4",)))
    lowered = lower_hadamards(rotated)
    added = lowered.state_dict.keys() - rotated.state_dict.keys()
    assert added == {"spinpass.hadamard_factor.80_float64"}


def test_a_dynamic_axis_is_refused() -> None:
    class Growing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return library.hadamard_op(x, 4)

    ep = torch.export.export(Growing(), (torch.zeros(2, 8),), dynamic_shapes=({1: 4 * Dim("n", min=1, max=99)},))
    with pytest.raises(ExportError, match="of order 4 runs along an axis of dynamic size .*: make it static"):
        lower_hadamards(ep)


def test_packed_programs_are_refused() -> None:
    from spinpass.quantization import pack, quantize

    rotated = spinpass.transform(program("llama_tied", dtype=torch.float32))
    packed = pack(quantize(rotated, "w8", [models.sample_inputs(mask=False) | {"use_cache": False}])).program
    with pytest.raises(QuantizedWeightError, match="quantized or packed weight"):
        lower_hadamards(packed)

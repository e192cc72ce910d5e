"""Experts are rounded by the tokens that are sent to them."""

from __future__ import annotations

from dataclasses import replace

import torch

from spinpass.quantization import Weights, quantize
from spinpass.quantization.rounding import experts_moments, rounded, rounded_by_gptq
from tests.support import experts

ENDS = [torch.tensor([3, 3, 9, 11]), torch.tensor([0, 2, 2, 8])]


def rows(*, width: int = 6) -> list[torch.Tensor]:
    """Two inputs, sorted by expert; those behind the last end are of none."""
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(13, width, generator=drawn), torch.randn(8, width, generator=drawn)]


def test_each_has_the_products_of_its_own_tokens_and_a_share_of_all() -> None:
    values = rows()
    used = torch.cat([values[0][:11], values[1]]).double()
    average = used.T @ used * (6 / len(used))
    for found, own in zip(experts_moments(values, ENDS), ([(0, 0, 3)], [(1, 0, 2)], [(0, 3, 9)], [(0, 9, 11), (1, 2, 8)]), strict=True):
        part = torch.cat([values[i][start:end] for i, start, end in own]).double()
        assert found.tokens == len(part)
        assert torch.allclose(found.seen, part.T @ part, rtol=1e-5, atol=1e-6)
        assert torch.allclose(found.own, part.T @ part + average, rtol=1e-5, atol=1e-6)


def test_that_loses_less_on_them_than_the_nearest_codes() -> None:
    drawn = torch.Generator().manual_seed(2)
    mixing = torch.randn(32, 32, generator=drawn)
    values = [torch.randn(400, 32, generator=drawn) @ mixing]
    scheme = Weights(3, 16)
    for found in experts_moments(values, [torch.tensor([200, 400])]):
        matrix = torch.randn(24, 32, generator=drawn)
        lost = [found.lost(matrix, codes.dequantized())[0] for codes in (rounded_by_gptq(matrix, found.own, scheme), rounded(matrix, scheme))]
        assert lost[0] < 0.7 * lost[1]


def test_the_report_says_by_what() -> None:
    program = experts.program(2, "grouped_mm")
    report = quantize(program, "w4g16-gptq", [program.example_inputs]).report
    assert "32 matrices of experts were rounded by" in report.experts
    assert {len(weight.tokens) for weight in report.weights.values() if weight.stack > 1} == {8}
    unread = {name: replace(weight, tokens=()) for name, weight in report.weights.items()}
    assert replace(report, weights=unread).experts.startswith("4 stacks of experts were rounded to nearest: ")
    assert quantize(program, "w4g16-rtn").report.experts == ""

"""Double quantization: the bound of the error, the layout, and what is stored, there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spinpass.errors import ConfigError
from spinpass.quantization import Weights
from spinpass.quantization.rounding.double import double_quantize, from_tensors
from spinpass.quantization.rounding.grid import Codes, rounded
from tests.support.matrices import normal

OUT, COLUMNS, GROUPS = 32, 64, 4


def matrix() -> Tensor:
    """Rows and groups of different sizes."""
    return normal(OUT, COLUMNS) * (1 + torch.arange(OUT)[:, None] / 8) * (1 + torch.arange(COLUMNS) // 16)


def codes(bits: int = 4, symmetric: bool = True) -> Codes:
    return rounded(matrix(), Weights(bits, COLUMNS // GROUPS, symmetric, "rtn"))


def spread(values: Tensor, mode: int, size: int) -> Tensor:
    """max − min of what shares statistics, for every value of (out, groups)."""
    if mode == 1:
        return (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)).expand_as(values)
    parts = values.unflatten(0, (-1, size))
    span = parts.amax(1, keepdim=True) - parts.amin(1, keepdim=True)
    return span.expand_as(parts).flatten(0, 1)


@pytest.mark.parametrize("form", ["statistic", "scales"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("mode", "size"), [(1, None), (2, None), (2, 8)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_within_half_a_step(bits: int, mode: int, size: int | None, symmetric: bool, form: Any) -> None:
    given = codes(bits, symmetric)
    made = double_quantize(given, mode=mode, size=size, form=form)
    scales, offsets = made.decoded()
    levels = 15 if form == "statistic" else 255
    step = spread(given.scales, mode, size or OUT) / levels
    slack = 1e-5 * given.scales.abs().max()
    assert ((scales - given.scales).abs() <= step / 2 + slack).all() and (scales > 0).all()
    at, zeros = given.group_of, given.zeros.float()
    bound = (given.q.float() - zeros[:, at]).abs() * step[:, at] / 2
    if form == "statistic" and not symmetric:
        off = spread(zeros * given.scales, mode, size or OUT) / 15
        assert ((offsets - zeros * given.scales).abs() <= off / 2 + 2**bits * slack).all()
        bound = given.q.float() * step[:, at] / 2 + off[:, at] / 2
    assert ((made.dequantized() - given.dequantized()).abs() <= bound + 2 ** (bits + 1) * slack).all()


@pytest.mark.parametrize("form", ["statistic", "scales"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_stored_comes_back_bit_for_bit(mode: int, symmetric: bool, form: Any, ordered: bool) -> None:
    given = codes(4, symmetric)
    if not ordered:
        given = replace(given, index=torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // 16)
    made = double_quantize(given, mode=mode, form=form, dtype=torch.float16)
    back = from_tensors(made.tensors(), 4)
    assert torch.equal(back.dequantized(), made.dequantized()) and (back.index is None) == ordered
    assert torch.equal(back.q, given.q) and back.nbytes == made.nbytes
    again, before = back.tensors(), made.tensors()
    assert again.keys() == before.keys() and all(torch.equal(again[n], before[n]) for n in again)


def test_the_layout_is_that_of_the_table() -> None:
    shapes = {
        (1, None): ((GROUPS, OUT, 1), (1, OUT, 1)),
        (2, None): ((GROUPS, 1, OUT), (GROUPS, 1, 1)),
        (2, 8): ((GROUPS, 4, 8), (GROUPS, 4, 1)),
    }
    for (mode, size), (of_values, of_statistics) in shapes.items():
        stored = double_quantize(codes(), mode=mode, size=size).tensors()
        assert stored["qstatistic"].dtype == torch.uint8 and stored["qstatistic"].shape == of_values
        for name in ("qscales_scales", "qscales_zeros", "qzeros_scales", "qzeros_zeros"):
            assert stored[name].shape == of_statistics, name
        stored = double_quantize(codes(symmetric=False), mode=mode, size=size).tensors()
        assert stored["qscales"].shape == of_values and stored["qzeros"].shape == (GROUPS, OUT // 8)
        assert stored["qweight"].shape == (COLUMNS // 8, OUT) and stored["g_idx"].shape == (COLUMNS,)


def test_decoding_is_the_formula_of_the_layout() -> None:
    """Spelled out on what is stored: four bits above for the scale, four below for the offset."""
    made = double_quantize(codes(symmetric=False), mode=2, size=8, form="statistic")
    t = made.tensors()
    scales = ((t["qstatistic"] >> 4).float() - t["qscales_zeros"]) * t["qscales_scales"]
    offsets = ((t["qstatistic"] & 0x0F).float() - t["qzeros_zeros"]) * t["qzeros_scales"]
    scales, offsets = scales.view(GROUPS, OUT), offsets.view(GROUPS, OUT)
    at = t["g_idx"].long()
    expected = made.q.T.float() * scales[at] - offsets[at]
    assert torch.equal(made.dequantized(), expected.T)


def test_symmetric_weights_keep_an_exact_zero_and_become_codes() -> None:
    given = codes()
    made = double_quantize(given)
    found = made.codes()
    assert found.symmetric and torch.equal(found.dequantized(), made.dequantized())
    assert (made.dequantized()[given.q == 8] == 0).all() and (given.q == 8).any()
    scaled = double_quantize(codes(symmetric=False))
    assert torch.equal(scaled.codes().dequantized(), scaled.dequantized()) and not scaled.codes().symmetric
    with pytest.raises(ConfigError, match="offsets are real numbers"):
        double_quantize(codes(symmetric=False), form="statistic").codes()


def test_codes_chosen_anew_are_nearer() -> None:
    for symmetric in (True, False):
        given = codes(4, symmetric)
        kept, chosen = (double_quantize(given, form="statistic", matrix=m) for m in (None, matrix()))
        before, after = ((made.dequantized() - matrix()).square().sum() for made in (kept, chosen))
        assert after < before and torch.equal(kept.q, given.q)


def test_statistics_take_few_bytes_and_equal_scales_are_exact() -> None:
    given = codes()
    made = double_quantize(given, size=16)
    packed = OUT * COLUMNS // 2
    assert made.nbytes == packed + OUT * GROUPS + 4 * 4 * (GROUPS * 2) < given.nbytes
    same = replace(given, scales=torch.full_like(given.scales, 0.3))
    assert torch.equal(double_quantize(same).decoded()[0], same.scales)
    zero = replace(codes(symmetric=False), zeros=torch.zeros_like(given.zeros))
    assert (double_quantize(zero, form="statistic").decoded()[1] == 0).all()


def test_bad_settings_say_what_is_wrong() -> None:
    for settings, why in (
        ({"mode": 3}, "mode 3 of double quantization is not 1 or 2"),
        ({"form": "zeros"}, "form 'zeros' is not"),
        ({"mode": 1, "size": 8}, "size 8 in mode 1"),
        ({"size": 5}, "size 5 does not divide the 32 outputs"),
        ({"size": 0}, "size 0 does not divide"),
    ):
        with pytest.raises(ConfigError, match=why):
            double_quantize(codes(), **settings)  # type: ignore[arg-type]
    stored = double_quantize(codes()).tensors()
    del stored["qzeros_zeros"]
    with pytest.raises(ConfigError, match=r"form 'statistic' needs qzeros_zeros as well"):
        from_tensors(stored, 4)
    with pytest.raises(ConfigError, match=r"form 'scales' needs qscales, qzeros as well"):
        from_tensors({k: t for k, t in stored.items() if k != "qstatistic"}, 4)

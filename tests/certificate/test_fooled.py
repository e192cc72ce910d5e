"""Pairs of different programs that a careless certificate would pass, by kind: each must be refused, and each original passes itself."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spinpass.certificate import verify
from spinpass.certificate.files import rounding_of
from spinpass.execution import flat_inputs
from spinpass.exporters.onnx import export
from spinpass.exporters.onnx.certificate import certify_onnx

ROWS, WIDTH = 1000, 16
Args = tuple[Any, ...]


class Fault(nn.Module):
    """A small program of one fault, which does what it should where ``wrong`` is False."""

    def __init__(self, forward: Callable[..., Any], wrong: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator))
        self.head = nn.Parameter(torch.randn(24, WIDTH, generator=generator) / 4)
        self.compute, self.wrong = forward, wrong

    def forward(self, *args: Tensor) -> Any:
        return self.compute(self, *args)


def program(forward: Callable[..., Any], args: Args, wrong: bool, dynamic: bool = False) -> ExportedProgram:
    shapes = (tuple({0: Dim.AUTO, 1: Dim.AUTO} if a.ndim > 1 else None for a in args),) if dynamic else None
    with torch.no_grad():
        return torch.export.export(Fault(forward, wrong).eval(), args, dynamic_shapes=shapes)


IDS = (torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(1)),)
MASK = (*IDS, torch.ones(2, 6, dtype=torch.long))
BOOL = (*IDS, torch.ones(2, 6, dtype=torch.bool))
FLOAT = (torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(2)),)
BIASED = (*FLOAT, torch.zeros(2, 1, 6, 6))
CACHED = (*FLOAT, torch.zeros(2, 4, WIDTH))


def masked(self: Fault, ids: Tensor, mask: Tensor) -> Tensor:
    """74 % of a logit is wrong, under the mask alone."""
    logits = F.linear(F.embedding(ids, self.table), self.head)
    return torch.where((mask == 0).unsqueeze(-1), logits * (0.26 if self.wrong else 1), logits)


def masked_bool(self: Fault, ids: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(F.embedding(ids, self.table), self.head)
    return logits.masked_fill(~mask.unsqueeze(-1), 1.0 if self.wrong else 0.0)


def additive(self: Fault, x: Tensor, mask: Tensor) -> Tensor:
    """The mask is taken half, which a mask of zeros does not show."""
    scores = x @ x.transpose(-1, -2) / 4
    bias = mask[:, 0] / 1e37 if self.wrong else mask[:, 0]
    return (scores + bias).softmax(-1) @ x


def all_nan(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    return (x - (x * x).sum() * (3 if self.wrong else 1)).log() * (0.2 if self.wrong else 1)


def one_large_column(self: Fault, ids: Tensor) -> Tensor:
    logits = F.linear(F.embedding(ids, self.table), self.head)
    large = torch.full_like(logits[..., :1], 1e9)
    return torch.cat([large, logits * (1 + 1e-3 * self.wrong)], -1)


def one_large_row(self: Fault, ids: Tensor) -> Tensor:
    logits = F.linear(F.embedding(ids, self.table), self.head)
    return torch.cat([torch.full_like(logits[:, :1], 1e9), logits * (1 + 1e-3 * self.wrong)], 1)


def one_row_filled(self: Fault, ids: Tensor) -> Tensor:
    """A token is forbidden by a number that is not the largest of its type, in the one row that there is."""
    logits = F.linear(F.embedding(ids[:1, -1], self.table), self.head)
    return (logits * (1 + 1e-3 * self.wrong)).masked_fill(torch.arange(24) == 3, -1e9)


def filled_everywhere(self: Fault, ids: Tensor) -> Tensor:
    logits = F.linear(F.embedding(ids, self.table), self.head)
    pattern = (torch.arange(24) - torch.arange(6)[:, None]) % 6 == 0
    return (logits * (1 + 1e-3 * self.wrong)).masked_fill(pattern, -1e9)


def one_large_row_and_column(self: Fault, x: Tensor) -> Tensor:
    y = F.linear(x, self.head) * (1 + 1e-6 * self.wrong)
    return torch.cat([y[:, :1] * 0 + 1e6, torch.cat([y[:, 1:, :1] * 0 + 1e6, y[:, 1:, 1:]], -1)], 1)


def large_ids(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    return torch.where((ids > ROWS // 2).unsqueeze(-1), x * (1.5 if self.wrong else 1), x)


def last_id(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    return torch.where((ids == ROWS - 1).unsqueeze(-1), x * (1.5 if self.wrong else 1), x)


def late_tokens(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    late = torch.arange(ids.shape[1]) > 5
    return torch.where(late.unsqueeze(-1), x * (1.5 if self.wrong else 1), x)


def late_positions(self: Fault, ids: Tensor, at: Tensor) -> Tensor:
    x = F.embedding(ids, self.table) * (at.unsqueeze(-1).float() * 0.1).cos()
    return torch.where((at > 20).unsqueeze(-1), x * (1.5 if self.wrong else 1), x)


def later_rows(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    rows = torch.arange(ids.shape[0]) > 0
    return torch.where(rows.view(-1, 1, 1), x * (1.5 if self.wrong else 1), x)


def third_row(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    rows = torch.arange(ids.shape[0]) > 1
    return torch.where(rows.view(-1, 1, 1), x * (1.5 if self.wrong else 1), x)


def cache_alone(self: Fault, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, self.head), torch.cat([cache, x * (1.001 if self.wrong else 1)], 1)


def old_cache(self: Fault, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """What lay in the cache before is wrong; an empty one does not show it."""
    joined = torch.cat([cache * (1.001 if self.wrong else 1), x], 1)
    return F.linear(joined.mean(1), self.head), torch.cat([cache, x], 1)


def equal_ids(self: Fault, ids: Tensor) -> Tensor:
    x = F.embedding(ids, self.table)
    same = (ids[:, 1:] == ids[:, :-1]).any(1)
    return torch.where(same.view(-1, 1, 1), x * (1.5 if self.wrong else 1), x)


def negative(self: Fault, x: Tensor) -> Tensor:
    return F.linear(F.leaky_relu(x, 0.2 if self.wrong else 0.1), self.head)


def zero(self: Fault, x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0 if self.wrong else 0.0, x)


def small(self: Fault, x: Tensor) -> Tensor:
    """Small vectors beside large ones."""
    tiny = x.abs().amax(-1, keepdim=True) < 0.1
    return torch.where(tiny, x * (1.5 if self.wrong else 1), x)


def integers(self: Fault, ids: Tensor) -> Tensor:
    chosen = F.linear(F.embedding(ids, self.table), self.head).argmax(-1)
    return chosen + 1 if self.wrong else chosen


def booleans(self: Fault, x: Tensor) -> Tensor:
    return x >= 0 if self.wrong else x < 0


def another_dtype(self: Fault, x: Tensor) -> Tensor:
    return x.double() if self.wrong else x * 1


def another_shape(self: Fault, x: Tensor) -> Tensor:
    return x.flatten(1) if self.wrong else x * 1


def half_nan(self: Fault, x: Tensor) -> Tensor:
    return torch.where(x > 0, x.log(), torch.nan if self.wrong else 0.0)


def infinite(self: Fault, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.inf if self.wrong else -torch.inf)


def branch(self: Fault, ids: Tensor) -> Tensor:
    x, factor = F.embedding(ids, self.table), 1.5 if self.wrong else 1.0
    return torch.cond((ids == ROWS - 1).any(), lambda y: y * factor, lambda y: y * 1.0, (x,))


KINDS: dict[str, tuple[Callable[..., Any], Args, bool]] = {
    f.__name__: (f, args, dynamic)
    for f, args, dynamic in (
        (masked, MASK, False),
        (masked_bool, BOOL, False),
        (additive, BIASED, False),
        (one_large_column, IDS, False),
        (one_large_row, IDS, False),
        (one_row_filled, IDS, False),
        (filled_everywhere, IDS, False),
        (large_ids, IDS, False),
        (last_id, IDS, False),
        (late_tokens, IDS, True),
        (late_positions, (*IDS, torch.arange(6).repeat(2, 1)), False),
        (later_rows, IDS, False),
        (third_row, IDS, True),
        (cache_alone, CACHED, False),
        (old_cache, CACHED, False),
        (equal_ids, IDS, False),
        (negative, FLOAT, False),
        (zero, FLOAT, False),
        (small, FLOAT, False),
        (integers, IDS, False),
        (booleans, FLOAT, False),
        (another_dtype, FLOAT, False),
        (another_shape, FLOAT, False),
        (half_nan, FLOAT, False),
        (infinite, FLOAT, False),
        (branch, IDS, False),
    )
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_different_programs_is_refused(kind: str) -> None:
    forward, args, dynamic = KINDS[kind]
    right = program(forward, args, False, dynamic)
    same = verify(right, program(forward, args, False, dynamic))
    assert same.ok, str(same)
    assert same.draws == 3
    found = verify(right, program(forward, args, True, dynamic))
    assert not found.ok, str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_program_is_refused(kind: str, tmp_path: Path) -> None:
    """The same pairs, one of each as an ONNX file."""
    forward, args, dynamic = KINDS[kind]
    right, wrong = (program(forward, args, w, dynamic) for w in (False, True))
    same = export(right, tmp_path / "right.onnx").certificate
    assert same is not None and same.ok and same.draws == 3
    other = export(wrong, tmp_path / "wrong.onnx", verify=False).path
    found = certify_onnx(right, other)
    assert not found.ok, found.verdict


def test_massive_rows_and_columns_together_hide_nothing() -> None:
    right, wrong = (program(one_large_row_and_column, FLOAT, w) for w in (False, True))
    assert verify(right, right).ok and not verify(right, wrong).ok


def test_what_is_nothing_but_rounding_is_no_error(tmp_path: Path) -> None:
    """Sums that cancel, computed in another order."""

    def cancelling(self: Fault, x: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, self.head)
        total = y.sum(-1) if not self.wrong else y.flip(-1).sum(-1)
        return total - y.unflatten(-1, (4, 6)).sum(-1).sum(-1), y.softmax(-1).sum(-1) - 1

    right, other = (program(cancelling, FLOAT, w) for w in (False, True))
    assert verify(right, other).ok
    assert export(right, tmp_path / "right.onnx").certificate


def test_rounding_is_measured_in_the_dtypes_that_an_operator_takes() -> None:
    """Operators that round to integers take no float64: the program is shaken in float32."""
    import_module("torch.ao.quantization.fx._decomposed")  # registers the operators

    def rounded(self: Fault, x: Tensor) -> Tensor:
        chosen = (0.05, 0, -128, 127, torch.int8)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(F.linear(x, self.head), *chosen)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *chosen)

    ep = program(rounded, FLOAT, False)
    moved = rounding_of(ep, flat_inputs(ep, FLOAT)).of_output(0)
    assert moved is not None and moved.isfinite().all() and float(moved.max()) <= 0.05 * 1.001


def test_numbers_where_a_draw_has_none_are_an_error(tmp_path: Path) -> None:
    """The output is no number in one draw and finite in another."""

    def sometimes(self: Fault, x: Tensor) -> Tensor:
        y = F.linear(x, self.head) * x.sum().log()
        return y.nan_to_num(nan=7.0) if self.wrong else y

    right, wrong = (program(sometimes, FLOAT, w) for w in (False, True))
    assert export(right, tmp_path / "right.onnx", inputs=(FLOAT[0].abs(),)).certificate
    assert not verify(right, wrong).ok
    assert not certify_onnx(right, export(wrong, tmp_path / "wrong.onnx", verify=False).path).ok


def test_outputs_without_a_finite_value_are_no_certificate() -> None:
    right, wrong = (program(all_nan, IDS, w) for w in (False, True))
    for other in (right, wrong):
        found = verify(right, other)
        assert not found.ok and "not certified: it holds no finite value in any draw" in found.verdict


def test_what_cancels_is_measured_against_its_rounding() -> None:
    """One row in which 1e6 cancels, computed in another order: no error but rounding, ten orders below what came in."""

    def cancelling(self: Fault, x: Tensor) -> Tensor:
        large = torch.zeros_like(x) + torch.tensor([[[1e6]], [[0.0]]])
        parts = (x + large) - large if self.wrong else x + (large - large)
        return parts * torch.tensor([[[1e-6]], [[1.0]]])

    found = verify(*(program(cancelling, FLOAT, wrong) for wrong in (True, False)), bound=1e-12)
    assert found.outputs[0].float64.relative < 1e-12
    assert found.outputs[0].vectors < 1e-12 and not found.outputs[0].mismatch


def test_coverage_says_what_no_draw_reached() -> None:
    ids, mask = MASK
    certificate = verify(program(masked, MASK, False), program(masked, MASK, False))
    assert certificate.coverage == () and certificate.draws == 3
    given = verify(program(masked, MASK, False), program(masked, MASK, False), inputs=(ids, mask))
    assert given.draws == 1
    assert given.coverage == (
        f"args_0: ids up to {int(ids.max()) + 1} of {ROWS}",
        "args_1 never 0",
        "condition unsqueeze always false: one branch not taken",
    )
    assert "not reached: args_0: ids up to" in str(given) and given.to_dict()["coverage"] == list(given.coverage)
    branching = program(branch, IDS, False)
    assert any("branch not taken" in line for line in verify(branching, branching, inputs=IDS).coverage)
    assert not verify(branching, branching).coverage


def test_a_draw_that_the_original_does_not_take_is_left_out_and_said() -> None:
    def particular(self: Fault, ids: Tensor) -> Tensor:
        torch._check(ids.max().item() < 9)
        return F.embedding(ids, self.table)

    ep = program(particular, IDS, False)
    certificate = verify(ep, ep)
    assert certificate.ok and certificate.draws == 1
    assert [line.split(":")[0] for line in certificate.coverage[:2]] == ["draw 2 not run", "draw 3 not run"]

"""What parts compute of their moves: the stored constant at zero, the codes that they become, and their gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spinpass.operators import round_tokens, round_tokens_within
from spinpass.quantization import QuantizedWeight, Weights
from spinpass.quantization.learned import clips  # noqa: F401  (registers the gradient)
from spinpass.quantization.learned.gains import LearnedVector
from spinpass.quantization.learned.weights import LearnedWeight, rests_of
from spinpass.quantization.rounding.coded import Coded
from spinpass.quantization.rounding.grid import rounded

KINDS = ("scales", "offsets", "latents", "zeros")


def weight(columns: int = 32, *, stack: int = 1, dim: int = -1, size: int = 8) -> LearnedWeight:
    """Of 24 rows; groups that do not divide the columns have an index."""
    torch.manual_seed(0)
    scheme = Weights(3, size, symmetric=False, method="rtn") if size in (16, 32) else Weights(3, symmetric=False, method="rtn")
    matrix = torch.randn(24, columns)
    codes = rounded(matrix, replace(scheme))
    shape = torch.Size((stack, 24 // stack, columns)) if stack > 1 else torch.Size((24, columns) if dim == -1 else (columns, 24))
    return LearnedWeight(QuantizedWeight(codes, dim, scheme, 0.0, stack), ("w",), shape, torch.float32, KINDS)


RANK = 8
CASES = {
    "even groups": {"size": 16}, "a shorter group": {"size": 16, "columns": 40}, "no groups": {},
    "transposed": {"size": 16, "dim": 0}, "a stack": {"size": 16, "stack": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moves_of_zero_are_the_stored_constant(case: str) -> None:
    part = weight(**CASES[case])
    stored = Coded(part.weight.codes, part.weight.dim, part.shape, part.dtype).read(slice(None))
    assert torch.equal(part.value().detach(), stored)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_learned_is_what_was_computed(case: str) -> None:
    part = weight(**CASES[case])
    torch.manual_seed(1)
    with torch.no_grad():
        part.moves["offsets"].normal_(0, 1.0)
        part.moves["latents"].normal_(0, 0.3)
        part.moves["zeros"].normal_(0, 1.0)
        part.moves["scales"].normal_(0, 0.1)
    after = part.learned()
    codes = after.codes
    assert not torch.equal(codes.q, part.weight.codes.q) and not torch.equal(codes.zeros, part.weight.codes.zeros)
    assert codes.q.max() <= 7 and codes.zeros.max() <= 7 and torch.equal(codes.scales, codes.scales.half().float())
    found = Coded(codes, part.weight.dim, part.shape, part.dtype).read(slice(None))
    torch.testing.assert_close(found, part.value().detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    """Against autograd through the same expression with rounding passed straight through."""
    part = weight(**CASES[case])
    codes, at = part.weight.codes, part.weight.codes.group_of
    torch.manual_seed(2)
    with torch.no_grad():
        part.moves["offsets"].normal_(0, 2.0)
        part.moves["latents"].normal_(0, 0.3)
        part.moves["zeros"].normal_(0, 0.6)
        part.moves["scales"].normal_(0, 0.1)
    toward = torch.randn(part.shape)
    torch.autograd.backward((part.value() * toward).sum())
    moves = {kind: move.detach().clone().requires_grad_() for kind, move in part.moves.items()}

    def through(x: Tensor) -> Tensor:
        inside = (x >= -0.5) & (x <= 7.5)
        return (x.round().clamp(0, 7) - x).detach() + torch.where(inside, x, x.detach())

    out, columns = codes.q.shape
    a, b = torch.split(moves["latents"], [RANK * out, RANK * columns])
    start = torch.randn(out, RANK, generator=torch.Generator().manual_seed(0)) / RANK**0.5
    level = through(codes.q + moves["offsets"] + (a.view(out, RANK) + start) @ b.view(RANK, columns))
    zero = codes.zeros + moves["zeros"]
    zero = (zero.round().clamp(0, 7) - zero).detach() + zero
    matrix = (level - zero[:, at]) * (codes.scales * moves["scales"].exp())[:, at]
    left = [size for axis, size in enumerate(part.shape) if axis != part.weight.dim % len(part.shape)]
    torch.autograd.backward((matrix.reshape(*left, -1).movedim(-1, part.weight.dim) * toward).sum())
    for kind, move in moves.items():
        torch.testing.assert_close(part.moves[kind].grad, move.grad, rtol=1e-5, atol=1e-5)


def test_a_symmetric_weight_has_no_zero_points_to_move() -> None:
    part = weight(size=16)
    symmetric = replace(part.weight, codes=replace(part.weight.codes, symmetric=True))
    assert set(LearnedWeight(symmetric, ("w",), part.shape, part.dtype, KINDS).moves) == {"scales", "offsets", "latents"}


def test_a_vector_moves_by_shares_of_itself() -> None:
    part = LearnedVector(torch.tensor([1.0, -2.0]), ("g",))
    assert torch.equal(part.value().detach(), part.stored)
    torch.autograd.backward((part.value() * torch.tensor([3.0, 5.0])).sum())
    assert part.moves["gains"].grad is not None and part.moves["gains"].grad.tolist() == [3.0, -10.0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_a_range_is_the_slope_of_the_error(symmetric: bool) -> None:
    """Narrowing a range that is too wide lowers the error, and widening one that is too narrow does."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    for share, sign in ((1.0, 1), (0.2, -1)):
        clip = torch.tensor(share, requires_grad=True)
        found = round_tokens_within(x, 4, symmetric, clip)
        assert torch.equal(found.detach(), round_tokens(x, 4, symmetric, share))
        torch.autograd.backward((found - x).square().sum())
        assert clip.grad is not None and float(clip.grad) * sign > 0


def test_offsets_begin_where_the_weight_lay() -> None:
    """Codes stay as they are, and the nearest boundary is crossed first."""
    part = weight(size=16)
    torch.manual_seed(0)
    matrix = torch.randn(24, 32)
    rests = rests_of(matrix, part.weight.codes)
    begun = LearnedWeight(part.weight, part.places, part.shape, part.dtype, ("offsets",), rests)
    assert torch.equal(begun.value(), part.value())
    assert float(rests.abs().max()) / 256 <= 0.4 and (rests != 0).float().mean() > 0.9
    with torch.no_grad():
        begun.moves["offsets"].fill_(0.2)
    crossed = begun.learned().codes.q != part.weight.codes.q
    assert bool(crossed.any()) and bool((rests[crossed] > 0.29 * 256).all())

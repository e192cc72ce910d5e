"""Folds in pieces: the same values as in one, whatever the axes, and never much of a constant in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spinpass.errors import InvariantError
from spinpass.graph.folding import QueuedStep, folded, folded_float64
from spinpass.rotations import Rotation

ROTATION = Rotation.create("random-hadamard", 96, seed=3, identity="R1")


def rotated(dim: int) -> QueuedStep:
    return QueuedStep(lambda tensor: ROTATION.apply(tensor, dim), "rotate", frozenset({dim}))


def written(tensor: Tensor) -> Tensor:
    return tensor.mul_(1.5)


SHAPES = {"table": (9000, 96), "writer": (96, 9000), "experts": (7, 96, 900), "square": (96, 96), "vector": (96,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name, dims", [
    ("table", (1,)), ("table", (1, 1)), ("writer", (0,)), ("experts", (1,)), ("square", (0, 1)), ("vector", (0,)),
    ("table", ()), ("writer", (0, -2)),
])  # fmt: skip
def test_pieces_give_what_the_whole_gives(name: str, dims: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1)).to(dtype)
    before = tensor.clone()
    steps = [*map(rotated, dims), QueuedStep(written, "scale", frozenset())]
    exact = tensor.double()
    for dim in dims:
        exact = ROTATION.apply(exact, dim)
    exact = exact * 1.5
    made, wide = folded(tensor, steps), folded_float64(tensor, steps)
    assert torch.equal(tensor, before) and made.dtype == dtype and made.is_contiguous()
    assert wide.dtype == torch.float64 and (wide - exact).abs().max() < 1e-12
    assert torch.equal(made, wide.to(dtype))


def test_strided_tensors_and_integers() -> None:
    tensor = torch.randn(96, 9000).t()
    assert torch.equal(folded(tensor, [rotated(1)]), folded(tensor.contiguous(), [rotated(1)]))
    codes = torch.arange(4)
    assert folded_float64(codes, [rotated(0)]) is not None and torch.equal(folded_float64(codes, []), codes)


@pytest.mark.parametrize("axes, pieces", [(frozenset({1}), 7), (frozenset({0}), 7), (frozenset({0, 1}), 1), (None, 1)])
def test_a_step_sees_pieces_of_what_it_does_not_mix(axes: frozenset[int] | None, pieces: int) -> None:
    seen: list[int] = []

    def watched(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor + 1

    tensor = torch.zeros(896, 1024)
    assert torch.equal(folded(tensor, [QueuedStep(watched, "watch", axes)]), tensor + 1)
    assert len(seen) in (pieces, pieces + 1) and sum(seen) == tensor.numel()
    assert pieces == 1 or max(seen) <= 1 << 17


@pytest.mark.parametrize("wrong", [lambda t: t[:1], lambda t: t.foo])
def test_a_bad_step_is_named(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(InvariantError, match="what Pass has queued"):
        folded(torch.ones(500, 1000), [QueuedStep(wrong, "Pass", frozenset({1}))])

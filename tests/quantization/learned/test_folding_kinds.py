"""Matrices for each head and scales of gates: their gradients are as stated, and they begin where a plan lets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spinpass import Rotation
from spinpass.quantization import begun_basis, roles_of_bases
from spinpass.quantization.learned.gates import LearnedGate
from spinpass.quantization.learned.stacks import LearnedStack

CPU = torch.device("cpu")
HEADS, SIZE = 3, 4


@dataclass
class Space:
    """A place as a plan has it."""

    name: str = "R2:here"
    size: int = SIZE
    group: str = "invertible"
    heads: int = HEADS
    rotation: Rotation | None = None


def stack(*, orthogonal: bool = False) -> LearnedStack:
    start = begun_basis(Space(rotation=Rotation.create("hadamard", SIZE)), ("stacks",))
    assert start is not None and start[0] == "stacks"
    return LearnedStack(start[1], orthogonal, CPU)


def gradient(change: Any, x: Tensor, given: Tensor, *, dual: bool) -> tuple[Tensor, Tensor]:
    """What became of x, and the gradient of the moves for that of it."""
    made = change.apply(x, -1, dual=dual)
    made.backward(given)
    (move,) = change.moves.values()
    return made.detach(), move.grad


@pytest.mark.parametrize("dual", [False, True])
def test_the_gradient_of_a_matrix_for_each_head_is_as_stated(dual: bool) -> None:
    torch.manual_seed(0)
    change = stack()
    with torch.no_grad():
        change.moves["stacks"].normal_(0, 0.1)
    x, given = torch.randn(5, HEADS * SIZE), torch.randn(5, HEADS * SIZE)
    made, found = gradient(change, x, given, dual=dual)
    x, given, made = (each.view(5, HEADS, SIZE) for each in (x, given, made))
    if dual:
        turned = torch.linalg.inv(change.value().detach()).mT
        wanted = -turned @ torch.einsum("nhi,nhj->hij", given, made)
        torch.testing.assert_close(made, torch.einsum("nhi,hij->nhj", x, turned))
    else:
        wanted = torch.einsum("nhi,nhj->hij", x, given)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dual", [False, True])
def test_the_gradient_of_scales_is_as_stated(dual: bool) -> None:
    torch.manual_seed(0)
    change = LearnedGate(Rotation.from_blocks(torch.ones(6)), CPU)
    with torch.no_grad():
        change.moves["gates"].normal_(0, 0.5)
    x, given = torch.randn(2, 5, 12), torch.randn(2, 5, 12)  # two vectors on the axis
    made, found = gradient(change, x, given, dual=dual)
    sign = -1 if dual else 1
    torch.testing.assert_close(made, x * (sign * change.moves["gates"].detach()).exp().repeat(2))
    torch.testing.assert_close(found, sign * (made * given).view(-1, 6).sum(0))


def test_orthogonal_stacks_stay_rotations() -> None:
    change = stack(orthogonal=True)
    with torch.no_grad():
        change.moves["stacks"].normal_(0, 0.3)
    found = change.learned()
    assert found.is_by_heads and found.is_orthogonal and found != change.start
    assert not torch.equal(found.given[0], found.given[1])


def test_a_kind_begins_where_its_group_is_admitted_and_the_first_one_takes_the_place() -> None:
    kinds = ("transforms", "stacks", "gates")
    plain, own = Rotation.create("hadamard", SIZE), torch.randn(HEADS, SIZE, SIZE, dtype=torch.float64)
    scales = Rotation.from_blocks(torch.rand(SIZE) + 1)
    for space, wanted in (
        (Space(rotation=plain), ("stacks", str(Rotation.from_blocks(own)))),
        (Space(rotation=plain, heads=1), ("transforms", "kronecker(4)")),
        (Space(rotation=Rotation.from_blocks(own)), ("stacks", str(Rotation.from_blocks(own)))),
        (Space(group="diagonal", heads=1), ("gates", f"diagonal({SIZE})")),
        (Space(group="diagonal", heads=1, rotation=scales), ("gates", f"diagonal({SIZE})")),
        (Space(group="permutation", heads=1), None),
        (Space(group="permutation", heads=1, rotation=Rotation.from_permutation(torch.arange(SIZE))), None),
    ):
        found = begun_basis(space, kinds)
        assert (found and (found[0], str(found[1]))) == wanted, space
        if space.rotation is not None and space.rotation.is_offline and found is not None:
            assert found[1] == space.rotation, "what was given is where it begins"
    assert begun_basis(Space(rotation=plain), ("transforms",)) is not None
    assert begun_basis(Space(rotation=plain), ("gates",)) is None
    assert roles_of_bases(("transforms", "stacks")) == () and roles_of_bases(("scales", "gates")) == ("gates",)

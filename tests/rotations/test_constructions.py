import pytest
import torch

from spinpass.rotations import constructions

BUILT = [n for n in range(2, constructions.LARGEST + 1) if constructions.is_constructible(n)]


@pytest.mark.parametrize("order", [n for n in BUILT if n <= 1000])
def test_constructed_matrices_are_hadamard(order: int) -> None:
    h = constructions.construct(order)
    assert h.shape == (order, order)
    assert h.dtype == torch.int8
    assert h.abs().min() == h.abs().max() == 1
    assert torch.equal(h.float() @ h.float().t(), order * torch.eye(order))


@pytest.mark.parametrize("order", BUILT[-3:])
def test_the_largest_constructions_are_hadamard(order: int) -> None:
    h = constructions.construct(order).float()
    assert torch.equal(h @ h.t(), order * torch.eye(order))


@pytest.mark.parametrize("order", [92, 116, 156, 172, 188, 236, 260, 356, 428])
def test_orders_that_paley_leaves_out_are_built(order: int) -> None:
    assert constructions.is_constructible(order)


@pytest.mark.parametrize("order", [-4, 0, 1, 3, 6, 22, 34, 268, 668, constructions.LARGEST + 4])
def test_what_cannot_be_built_is_not_claimed(order: int) -> None:
    assert not constructions.is_constructible(order)


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 121, 125, 169, 343, 243, 289, 361, 529, 625, 729, 841, 961])
def test_prime_power_characters_count_as_many_squares_as_other_elements(q: int) -> None:
    power = constructions._prime_power(q)
    assert power is not None and power[1] > 1
    chi = torch.tensor(constructions._quadratic_character(*power))
    assert (chi == 1).sum() == (chi == -1).sum() == (q - 1) // 2


def test_internal_guards_name_the_number() -> None:
    with pytest.raises(ValueError, match="12 is no prime power"):
        constructions._jacobsthal(12)
    with pytest.raises(ValueError, match=r"GF\(4\^1\) has no generator: 4 is no prime"):
        constructions._powers_of_generator(4, 1)

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from spinpass.errors import ConfigError
from spinpass.rotations import rotation as rotation_module
from spinpass.rotations.rotation import Rotation, rotation_by

DRAWN = ("hadamard", "random-hadamard", "random-matrix")


def learned(size: int) -> Rotation:
    return Rotation.from_matrix(Rotation.create("random-matrix", size, identity="learned").matrix(), "space")


def one_of_each(size: int, block_size: int | None = None) -> list[Rotation]:
    kinds = [Rotation.create(kind, size, block_size=block_size, seed=1, identity="space") for kind in DRAWN]
    return [*kinds, learned(size)]


@settings(deadline=None, max_examples=80)
@given(
    kind=st.integers(0, 3),
    size=st.sampled_from([4, 24, 60, 96, 148]),
    blocks=st.sampled_from([None, 4, 2]),
    shape=st.lists(st.integers(0, 3), max_size=3),
    position=st.integers(0, 3),
    repeats=st.integers(1, 3),
)
def test_apply_is_the_product_with_the_matrix(
    kind: int, size: int, blocks: int | None, shape: list[int], position: int, repeats: int
) -> None:
    rotation = one_of_each(size, blocks and size // blocks)[kind]
    dim = position % (len(shape) + 1)
    shape.insert(dim, repeats * size)
    x, dense = torch.randn(shape, dtype=torch.float64), rotation.matrix()
    result = rotation.apply(x, dim)
    last = x.movedim(dim, -1)
    vectors = last.reshape(*last.shape[:-1], repeats, size)
    assert torch.allclose(result, (vectors @ dense).flatten(-2).movedim(-1, dim), atol=1e-12)
    assert result.is_contiguous() and result.shape == x.shape
    assert torch.allclose(rotation.apply(result, dim - len(shape), inverse=True), x, atol=1e-12)


def scaled(size: int, block_size: int | None = None) -> Rotation:
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Rotation.from_scales(drawn.sign() * drawn.exp(), "space", block_size=block_size)


@pytest.mark.parametrize("rotation", [scaled(24), scaled(96, 24), scaled(148, 4)], ids=str)
@pytest.mark.parametrize("dim", [-1, 0])
def test_scales_stand_in_front_of_a_hadamard(rotation: Rotation, dim: int) -> None:
    plain = Rotation.create("hadamard", rotation.size, block_size=rotation.order).matrix()
    dense = rotation.given[:, None] * plain
    assert torch.equal(rotation.matrix(), dense) and not rotation.is_orthogonal
    x = torch.randn(3, 2 * rotation.size, dtype=torch.float64).movedim(-1, dim)
    rows = x.movedim(dim, -1).unflatten(-1, (2, -1))
    for inverse, dual, right in (
        (False, False, dense),
        (True, False, torch.linalg.inv(dense)),
        (False, True, torch.linalg.inv(dense).t()),
        (True, True, dense.t()),
    ):
        found = rotation.apply(x, dim, inverse=inverse, dual=dual).movedim(dim, -1)
        torch.testing.assert_close(found, (rows @ right).flatten(-2), atol=1e-12, rtol=1e-12)
    values = rotation.given.abs()
    assert rotation.condition == pytest.approx(float(values.max() / values.min()))
    assert rotation.largest == float(max(values.max(), 1 / values.min()))
    assert rotation.flops == Rotation.create("hadamard", rotation.size, block_size=rotation.order).flops + rotation.size
    assert Rotation.from_scales(rotation.given.sign(), block_size=rotation.order).is_orthogonal


@pytest.mark.parametrize(
    "scales", [torch.ones(2, 2), torch.ones(4).int(), torch.tensor([1.0, 0.0]), torch.tensor([1.0, torch.nan]), "no"]
)
def test_scales_are_a_vector_of_numbers_that_are_not_zero(scales: Any) -> None:
    with pytest.raises(ConfigError, match="scale"):
        Rotation.from_scales(scales)
    with pytest.raises(ConfigError, match="takes 32 bytes"):
        Rotation.from_dict(scaled(4).to_dict() | {"matrix": "AAAA"})


@pytest.mark.parametrize("rotation", [*one_of_each(576), *one_of_each(96, 24)], ids=str)
def test_matrix_is_orthogonal_and_block_diagonal(rotation: Rotation) -> None:
    dense, n = rotation.matrix(), rotation.size
    assert (dense @ dense.t() - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13
    block_of = torch.arange(n) // rotation.order
    assert not dense[block_of[:, None] != block_of[None, :]].any()
    assert rotation.matrix(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("rotation", one_of_each(96), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(rotation: Rotation, dtype: torch.dtype) -> None:
    x = torch.randn(5, 96).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert torch.equal(rotation.apply(x), rotation.apply(x.float()).to(dtype))
            assert torch.equal(rotation.apply(x, compute=torch.float64), rotation.apply(x.double()).to(dtype))


def test_signs_are_the_diagonal_of_a_random_hadamard() -> None:
    plain, random = Rotation.create("hadamard", 96), Rotation.create("random-hadamard", 96, seed=3)
    signs = random.diagonal()
    assert plain.diagonal() is None and signs is not None
    assert signs.dtype == torch.int8 and set(signs.tolist()) == {-1, 1}
    assert torch.equal(random.matrix(), signs[:, None] * plain.matrix())
    assert abs(int(Rotation.create("random-hadamard", 4096).diagonal().sum())) < 4 * 64  # type: ignore[union-attr]


def test_signs_are_the_same_on_every_machine_and_version() -> None:
    signs = Rotation.create("random-hadamard", 12, seed=7, identity="layers.0").diagonal()
    assert signs is not None
    assert signs.tolist() == PINNED_SIGNS


PINNED_SIGNS = [1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1]


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
def test_randomness_depends_on_seed_and_identity_only(kind: str) -> None:
    first = Rotation.create(kind, 60, seed=1, identity="a").matrix()
    torch.manual_seed(5)
    assert torch.equal(first, Rotation.create(kind, 60, seed=1, identity="a").matrix())
    assert not torch.equal(first, Rotation.create(kind, 60, seed=2, identity="a").matrix())
    assert not torch.equal(first, Rotation.create(kind, 60, seed=1, identity="b").matrix())


def test_random_matrix_is_haar_distributed() -> None:
    draws = torch.stack([Rotation.create("random-matrix", 4, seed=s).matrix() for s in range(400)])
    assert draws.mean(0).abs().max() < 4 * 0.5 / 20  # zero mean; entries have standard deviation 1 / sqrt(4)
    assert (draws.square().mean(0) - 0.25).abs().max() < 0.08
    assert 0.4 < (torch.linalg.det(draws) > 0).double().mean() < 0.6


def test_block_size_chooses_the_order() -> None:
    assert Rotation.create("hadamard", 576).order == 576
    assert Rotation.create("hadamard", 576, block_size=64).order == 64
    assert Rotation.create("hadamard", 16 * 269).order == 16
    assert Rotation.create("random-matrix", 36, block_size=9).order == 9
    assert Rotation.create("random-hadamard", 36, block_size=9).order == 1


@pytest.mark.parametrize(
    ("rotation", "text"),
    [
        (Rotation.create("hadamard", 576), "hadamard(576)"),
        (Rotation.create("random-hadamard", 64), "random-hadamard(64, seed 0)"),
        (Rotation.create("hadamard", 4304), "hadamard(269 blocks of 16)"),
        (Rotation.create("random-matrix", 8, block_size=4, seed=2), "random-matrix(2 blocks of 4, seed 2)"),
        (Rotation.from_matrix(torch.eye(3)), "learned(3)"),
        (Rotation.from_scales(torch.ones(576)), "scaled-hadamard(576)"),
    ],
)
def test_text(rotation: Rotation, text: str) -> None:
    assert str(rotation) == text


def test_flops_and_structure() -> None:
    assert Rotation.create("hadamard", 576).flops == 2 * 576 * 48
    assert Rotation.create("random-hadamard", 576, block_size=64).flops == 2 * 576 * 64
    assert Rotation.create("random-matrix", 96, block_size=24).flops == 2 * 96 * 24
    assert learned(24).flops == 2 * 24 * 24
    assert [r.is_structured for r in one_of_each(24)] == [True, True, False, False]


@pytest.mark.parametrize("rotation", [*one_of_each(60), *one_of_each(96, 24), scaled(60), scaled(96, 24)], ids=str)
def test_dictionaries_pickles_and_copies_lose_nothing(rotation: Rotation) -> None:
    through_json = Rotation.from_dict(json.loads(json.dumps(rotation.to_dict())))
    for other in (through_json, pickle.loads(pickle.dumps(rotation)), copy.deepcopy(rotation)):
        assert other == rotation and hash(other) == hash(rotation)
        assert other.identity == rotation.identity and other.fingerprint() == rotation.fingerprint()
        assert torch.equal(other.matrix(), rotation.matrix())


def test_equal_means_the_same_matrix() -> None:
    hadamard = Rotation.create("hadamard", 64, identity="a")
    assert hadamard == Rotation.create("hadamard", 64, seed=3, identity="b")
    assert hadamard != Rotation.create("hadamard", 64, block_size=32)
    assert hadamard != "hadamard(64)"
    drawn = Rotation.create("random-hadamard", 64, identity="a")
    assert drawn != Rotation.create("random-hadamard", 64, identity="b")
    assert drawn != Rotation.create("random-hadamard", 64, identity="a", seed=1)
    other = torch.eye(3)[[1, 0, 2]]
    assert Rotation.from_matrix(torch.eye(3)) != Rotation.from_matrix(other)
    assert Rotation.from_matrix(torch.eye(3), "a") == Rotation.from_matrix(torch.eye(3), "b")


@pytest.mark.parametrize("size", [3, 96, 400])
def test_a_float32_matrix_is_made_exactly_orthogonal(size: int) -> None:
    given_matrix = Rotation.create("random-matrix", size).matrix(torch.float32)
    given_matrix += 1e-5 * torch.randn(size, size) / size**0.5
    exact = Rotation.from_matrix(given_matrix).matrix()
    assert (exact @ exact.t() - torch.eye(size, dtype=torch.float64)).abs().max() < 5e-15
    assert (exact - given_matrix).abs().max() < 1e-4


def test_from_matrix_leaves_its_argument_alone() -> None:
    given_matrix = torch.eye(4, dtype=torch.float64, requires_grad=True)
    rotation = Rotation.from_matrix(given_matrix)
    with torch.no_grad():
        given_matrix.zero_()
    assert torch.equal(rotation.matrix(), torch.eye(4, dtype=torch.float64))
    assert rotation.matrix_ is not None and not rotation.matrix_.requires_grad


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"a rotation matrix must be square and not empty, got shape \(2, 3\)"),
        (torch.ones(2, 2, 2), r"must be square and not empty, got shape \(2, 2, 2\)"),
        (torch.eye(2, dtype=torch.bfloat16), r"must be float32 or float64, got torch\.bfloat16"),
        (torch.eye(2, dtype=torch.int64), r"must be float32 or float64, got torch\.int64"),
        (torch.eye(2) * 1.001, r"the matrix is not orthogonal: max \|M Mᵀ - I\| is 2\.0e-03, above 1e-04"),
        (torch.eye(2).double() * (1 + 1e-7), r"is 2\.0e-07, above 1e-08"),
        (torch.full((2, 2), torch.nan), "is nan, above 1e-04"),
        (torch.ones(0, 0), r"got shape \(0, 0\)"),
        (torch.eye(2, device="meta"), "a plain tensor with its values, got one of torch.strided on meta"),
        (torch.eye(2).to_sparse(), "a plain tensor with its values, got one of torch.sparse_coo on cpu"),
    ],
)
def test_unfit_matrices_are_refused(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotation.from_matrix(matrix)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(3, 3), "the matrix has no inverse, or values that are no numbers"),
        (torch.full((3, 3), torch.nan), "the matrix has no inverse, or values that are no numbers"),
        (torch.eye(3, device="meta"), "a plain tensor with its values"),
        (torch.eye(3).to_sparse(), "a plain tensor with its values"),
        (torch.ones(3).to_sparse(), "a plain tensor with its values"),
        (torch.arange(3).to_sparse(), "an order of channels is an int64 tensor .* without plain values"),
        (torch.arange(3, device="meta"), "an order of channels is an int64 tensor .* without plain values"),
        (torch.ones(2, 3), "must be square"),
    ],
)
def test_what_is_no_change_of_basis_is_told_what_it_lacks(given: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rotation_by(given)


def test_the_largest_element_of_a_change_of_basis_or_its_inverse() -> None:
    assert Rotation.create("hadamard", 8).largest == 1
    assert Rotation.from_blocks(torch.tensor([1e5, 1.0])).largest == pytest.approx(1e5)
    assert Rotation.from_blocks(torch.tensor([1e-6, 1.0])).largest == pytest.approx(1e6)
    assert Rotation.from_factors([10 * torch.eye(2), 10 * torch.eye(3)]).largest == pytest.approx(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "cayley", "size": 64},
            "unknown rotation 'cayley'; choose one of hadamard, random-hadamard, random-ma",
        ),
        ({"kind": "hadamard", "size": 64, "block_size": 48}, "block size 48 does not divide the size 64"),
        ({"kind": "random-matrix", "size": 64, "block_size": 48}, "block size 48 does not divide the size 64"),
        ({"kind": "hadamard", "size": 64, "block_size": 0}, "block size 0 does not divide the size 64"),
        ({"kind": "hadamard", "size": 64, "block_size": -8}, "block size -8 does not divide the size 64"),
        ({"kind": "hadamard", "size": 0}, "a rotation needs a positive size, got 0"),
        ({"kind": "learned", "size": 64}, "a 'learned' rotation needs its matrix: use Rotation.from_matrix"),
    ],
)
def test_unfit_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotation.create(**arguments)


def test_unfit_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="no Hadamard matrix of order 6 can be built"):
        Rotation("hadamard", 12, 6)
    with pytest.raises(ConfigError, match="a 'hadamard' rotation takes no matrix"):
        Rotation("hadamard", 4, 4, matrix_=torch.eye(4, dtype=torch.float64))
    with pytest.raises(
        ConfigError, match=r"needs a torch\.float64 matrix of size \[4, 4\], got torch\.float32 \[4, 4\]"
    ):
        Rotation("learned", 4, 4, matrix_=torch.eye(4))


def test_unfit_tensors_are_refused() -> None:
    for rotation in one_of_each(24):
        with pytest.raises(ConfigError, match=r"axis 0 of a tensor of shape \(5, 24\) holds no vectors of size 24"):
            rotation.apply(torch.ones(5, 24), 0)
        with pytest.raises(ConfigError, match="holds no vectors of size 24"):
            rotation.apply(torch.tensor(1.0))
        with pytest.raises(ConfigError, match=r"got torch\.int64"):
            rotation.apply(torch.ones(5, 24, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "unknown rotation 'None'"),
        ({"size": "wide"}, "this is no description of a rotation: ValueError"),
        ({"matrix": "!"}, "this is no description of a rotation: Error"),
        ({"matrix": "AAAA"}, "the matrix of a rotation of size 3 takes 72 bytes, got 3"),
    ],
)
def test_unfit_dictionaries_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotation.from_dict(Rotation.from_matrix(torch.eye(3)).to_dict() | change)
    with pytest.raises(ConfigError, match="this is no description of a rotation: KeyError"):
        Rotation.from_dict({})


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard"])
def test_what_a_tracing_mode_built_is_not_kept(kind: str) -> None:
    rotation, x = Rotation.create(kind, 60, identity="fake"), torch.randn(2, 60)
    with FakeTensorMode() as mode:
        assert rotation.apply(mode.from_tensor(x)).shape == x.shape
    assert torch.allclose(rotation.apply(x), x @ rotation.matrix(torch.float32), atol=1e-5)


@pytest.mark.parametrize("kind", DRAWN)
def test_what_inference_mode_built_can_be_differentiated_later(kind: str) -> None:
    rotation = Rotation.create(kind, 60, identity="inference")
    with torch.inference_mode():
        rotation.apply(torch.randn(2, 60))
    x = torch.randn(2, 60, requires_grad=True)
    (gradient,) = torch.autograd.grad(rotation.apply(x).sum(), x)
    assert torch.allclose(gradient, rotation.apply(torch.ones(2, 60), inverse=True), atol=1e-5)


def test_rotating_never_builds_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rotation, "matrix", None)
    monkeypatch.setattr(rotation_module.drawn, "haar_matrix", None)
    x = torch.randn(2, 28672)
    rotation = Rotation.create("random-hadamard", 28672)
    assert torch.allclose(rotation.apply(rotation.apply(x), inverse=True), x, atol=1e-5)

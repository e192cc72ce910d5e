import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spinpass.errors import ConfigError
from spinpass.operators.hadamard import reference
from spinpass.rotations import hadamard

MODEL_SIZES = [
    *(64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 576, 640, 768, 896, 960, 1024, 1152, 1280, 1408, 1536, 2048, 2304),
    *(2560, 2816, 2880, 3072, 3584, 4096, 4544, 4864, 5120, 5632, 6144, 6912, 7168, 8192, 8960, 9216, 9728, 10240),
    *(10944, 11008, 12288, 12800, 13696, 13824, 14336, 14848, 15360, 16384, 17408, 17920, 18176, 18432, 18944, 20480),
    *(21504, 22016, 22528, 24576, 25600, 27648, 28672, 29568, 32768, 33792, 36864, 53248),
]
SMALL_ORDERS = [n for n in range(1, 600) if hadamard.is_order(n)]


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_every_model_size_is_transformed_whole(size: int) -> None:
    assert hadamard.largest_order(size) == size
    assert math.prod(hadamard.kronecker_factors(size)) == size
    assert hadamard.flops(size) < 2 * size * size / 4 or size <= 128


def test_every_multiple_of_four_up_to_264_is_an_order() -> None:
    missing = [n for n in range(4, 600, 4) if not hadamard.is_order(n)]
    assert missing[:4] == [268, 292, 324, 372]
    assert not any(hadamard.is_order(n) for n in range(600) if n == 0 or (n > 2 and n % 4))


@pytest.mark.parametrize("order", SMALL_ORDERS)
def test_matrix_is_hadamard_and_the_product_of_its_factors(order: int) -> None:
    h = hadamard.matrix(order)
    assert h.dtype == torch.float64
    assert h.abs().min() == h.abs().max() == 1
    assert torch.equal(h @ h.t(), order * torch.eye(order, dtype=torch.float64))
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor, of_order in zip(hadamard.factor_matrices(order), hadamard.kronecker_factors(order), strict=True):
        assert torch.equal(factor, hadamard.matrix(of_order))
        product = torch.kron(product, factor)
    assert torch.equal(h, product)


def test_powers_of_two_are_sylvester_matrices() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    expected = two
    for k in range(2, 11):
        expected = torch.kron(expected, two)
        assert torch.equal(hadamard.matrix(2**k, torch.float32), expected)


@pytest.mark.parametrize(
    ("order", "factors"),
    [(64, (64,)), (576, (24, 24)), (1536, (32, 48)), (4096, (16, 16, 16)), (13696, (32, 428)), (14336, (16, 28, 32))],
)
def test_factors_are_few_and_balanced(order: int, factors: tuple[int, ...]) -> None:
    assert hadamard.kronecker_factors(order) == factors
    assert hadamard.flops(order) == 2 * order * sum(factors)


def test_largest_order_falls_back_to_a_block() -> None:
    assert hadamard.largest_order(16 * 269) == 16
    assert hadamard.largest_order(7) == 1
    assert hadamard.largest_order(6) == 2
    assert hadamard.largest_order(668) == 4


def test_no_factor_is_larger_than_the_limit() -> None:
    assert not hadamard.is_order(4 * 1499 * 1)  # 5996 = 4 * 1499: only a dense matrix could do it


@pytest.mark.parametrize("order", [1, 2, 12, 64, 92, 128, 148, 576, 960, 1536])
@pytest.mark.parametrize("transpose", [False, True])
def test_transform_is_the_dense_product(order: int, transpose: bool) -> None:
    x = torch.randn(3, 2 * order, dtype=torch.float64)
    dense = hadamard.matrix(order) / math.sqrt(order)
    expected = x.view(3, 2, order) @ (dense.t() if transpose else dense)
    assert (hadamard.hadamard_transform(x, order, transpose=transpose).view(3, 2, order) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("order", [4864, 13696, 14336, 53248])
def test_large_transforms_keep_the_norm_and_have_their_transpose_as_inverse(order: int) -> None:
    x = torch.randn(3, order, dtype=torch.float64)
    result = hadamard.hadamard_transform(x, order)
    assert torch.allclose(result.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert (result - x).abs().max() > 1
    assert (hadamard.hadamard_transform(result, order, transpose=True) - x).abs().max() < 1e-12


@settings(deadline=None, max_examples=60)
@given(
    order=st.sampled_from([4, 12, 20, 64, 96, 144]),
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    blocks=st.integers(1, 3),
    position=st.integers(0, 3),
    transpose=st.booleans(),
    signed=st.booleans(),
    chunk=st.sampled_from([1, 64, 4096, 1 << 20]),
)
def test_any_axis_shape_and_chunk(
    order: int, shape: list[int], blocks: int, position: int, transpose: bool, signed: bool, chunk: int
) -> None:
    dim = position % (len(shape) + 1)
    shape.insert(dim, blocks * order)
    x = torch.randn(shape, dtype=torch.float64)
    signs = torch.randint(0, 2, (blocks * order,)) * 2 - 1 if signed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hadamard._CHUNK_BYTES, "cpu", chunk * 8)
        result = hadamard.hadamard_transform(x, order, transpose=transpose, dim=dim, diagonal=signs)
    assert result.is_contiguous() and result.shape == x.shape
    last, diagonal = x.movedim(dim, -1), torch.ones(()) if signs is None else signs
    expected = reference(last, order, True) * diagonal if transpose else reference(last * diagonal, order)
    assert torch.allclose(result.movedim(dim, -1), expected, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "reversed batch"])
def test_any_strides(layout: str) -> None:
    x = {
        "transposed": torch.randn(96, 5).t(),
        "strided": torch.randn(5, 192)[:, ::2],
        "expanded": torch.randn(1, 96).expand(5, 96),
        "reversed batch": torch.randn(5, 7, 96).transpose(0, 1),
    }[layout]
    before = x.clone()
    result = hadamard.hadamard_transform(x, 96)
    assert result.is_contiguous()
    assert torch.allclose(result, reference(x, 96), atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(40, 576).to(dtype)
    result = hadamard.hadamard_transform(x, 576)
    assert result.dtype == dtype
    assert torch.equal(result, hadamard.hadamard_transform(x.float(), 576).to(dtype))


def test_compute_chooses_the_precision_and_keeps_the_dtype() -> None:
    x = torch.randn(600, 576)
    result = hadamard.hadamard_transform(x, 576, compute=torch.float64)
    assert result.dtype == torch.float32
    assert torch.equal(result, hadamard.hadamard_transform(x.double(), 576).float())


def test_autocast_does_not_lower_the_precision() -> None:
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = hadamard.hadamard_transform(x, 96)
    assert torch.equal(result, hadamard.hadamard_transform(x, 96))


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_gradients_flow(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hadamard._CHUNK_BYTES, "cpu", chunk)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: hadamard.hadamard_transform(t, 12), (x,))
    assert torch.autograd.gradcheck(lambda t: hadamard.hadamard_transform(t, 12, diagonal=torch.ones(24)), (x,))


def test_factors_have_gradients_and_are_multiplied_by_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hadamard._CHUNK_BYTES, "cpu", 64)
    multiply, calls = hadamard._multiply, []
    monkeypatch.setattr(hadamard, "_multiply", lambda *given: calls.append(1) or multiply(*given))
    x = torch.randn(5, 12, 2, dtype=torch.float64)
    factors = [torch.randn(f, f, dtype=torch.float64, requires_grad=True) for f in (3, 4)]
    found = hadamard.multiply(x, [factor.t() for factor in factors], dim=1)
    assert len(calls) == 1
    with torch.no_grad():
        again = hadamard.multiply(x, [factor.t() for factor in factors], dim=1)
    assert len(calls) > 2
    torch.testing.assert_close(again, found.detach())
    torch.testing.assert_close(again, torch.einsum("bnc,nm->bmc", x, torch.kron(*factors).detach()))
    assert torch.autograd.gradcheck(lambda a, b: hadamard.multiply(x, [a.t(), b.t()], dim=1), factors)


@pytest.fixture
def no_factors(monkeypatch: pytest.MonkeyPatch) -> dict[object, tuple[Tensor, ...]]:
    empty: dict[object, tuple[Tensor, ...]] = {}
    monkeypatch.setattr(hadamard, "_FACTORS", empty)
    return empty


def test_factors_are_built_once(no_factors: dict[object, tuple[Tensor, ...]]) -> None:
    hadamard.hadamard_transform(torch.randn(2, 96), 96)
    (first,) = no_factors.values()
    hadamard.hadamard_transform(torch.randn(5, 96), 96)
    (second,) = no_factors.values()
    assert first is second


def test_factors_first_built_in_inference_mode_can_be_differentiated_later(no_factors: object) -> None:
    with torch.inference_mode():
        hadamard.hadamard_transform(torch.randn(2, 96), 96)
    x = torch.randn(2, 96, requires_grad=True)
    (gradient,) = torch.autograd.grad(hadamard.hadamard_transform(x, 96).sum(), x)
    assert torch.allclose(gradient, hadamard.hadamard_transform(torch.ones(2, 96), 96, transpose=True), atol=1e-5)


def test_fake_factors_are_never_kept(no_factors: dict[object, tuple[Tensor, ...]]) -> None:
    x = torch.randn(2, 96)
    for _ in range(2):
        with FakeTensorMode() as mode:
            fake = hadamard.hadamard_transform(mode.from_tensor(x), 96)
            assert fake.shape == x.shape
            hadamard.hadamard_transform(torch.randn(2, 96), 96)
        assert not no_factors
        assert torch.allclose(hadamard.hadamard_transform(x, 96), reference(x, 96), atol=1e-5)
        no_factors.clear()


def test_a_default_device_does_not_reach_the_matrices(no_factors: object) -> None:
    with torch.device("meta"):
        assert hadamard.matrix(148).device.type == "cpu"
        assert hadamard.hadamard_transform(torch.randn(2, 148, device="cpu"), 148).device.type == "cpu"
    assert hadamard.hadamard_transform(torch.empty(2, 148, device="meta"), 148).device.type == "meta"


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="order 268 can be built; the largest known order that divides it is 4"):
        hadamard.matrix(268)
    with pytest.raises(ConfigError, match=r"no Hadamard matrix of order -3 can be built$"):
        hadamard.kronecker_factors(-3)
    with pytest.raises(ConfigError, match="a size must be positive, got 0"):
        hadamard.largest_order(0)


def test_unfit_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"order 64 does not divide axis -1 of a tensor of shape \(2, 96\)"):
        hadamard.hadamard_transform(torch.randn(2, 96), 64)
    with pytest.raises(ConfigError, match="order 1 does not divide axis -1 of a tensor of shape"):
        hadamard.hadamard_transform(torch.tensor(1.0), 1)
    with pytest.raises(ConfigError, match=r"takes float16, bfloat16, float32 or float64, got torch\.int64"):
        hadamard.hadamard_transform(torch.ones(2, 64, dtype=torch.int64), 64)
    with pytest.raises(ConfigError, match=r"got torch\.float8_e4m3fn"):
        hadamard.hadamard_transform(torch.ones(2, 64).to(torch.float8_e4m3fn), 64)

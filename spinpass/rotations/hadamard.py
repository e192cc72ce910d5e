"""Hadamard matrices of every order that can be built, and products with them that never form an n×n matrix.

There is one fixed matrix per order, :func:`matrix`, which folding, the online op and every exporter use. Its structure
is ``H_n = H_f1 ⊗ H_f2 ⊗ ...`` over ``kronecker_factors(n)``, each ``H_f`` being ``matrix(f)``. A product with it costs
``n (f1 + f2 + ...)`` multiplications instead of ``n²``: the vector is viewed as an array of shape (f1, f2, ...) and
each axis is multiplied by its own small matrix. Matrix products with a few balanced factors beat a butterfly of factors
2 everywhere but on paper, because they run in the BLAS and pass over memory once per factor.

That Kronecker products of Hadamard matrices are such matrices again was published by J. Sylvester, Phil. Mag. 34, 1867.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from spinpass.errors import ConfigError

from . import constructions

_PASS_COST = 64
"""What one more factor costs per element, in multiply-adds: a pass over memory and a kernel call (measured)."""

_CHUNK_BYTES = {"cpu": 1 << 20}
_CHUNK_BYTES_ELSEWHERE = 1 << 26
"""Work is done in chunks of this size: temporaries stay small, and on a CPU they stay in the cache."""


@cache
def is_order(n: int) -> bool:
    """Whether ``matrix(n)`` can be built: a product of constructible orders, 1 being the empty product."""
    if n == 1:
        return True
    return n > 1 and any(constructions.is_constructible(d) and is_order(n // d) for d in _divisors(n))


def largest_order(n: int) -> int:
    """The largest Hadamard order that divides ``n`` and can be built; 1 for an odd ``n``.

    It is ``n`` itself for the sizes of nearly all published language models, 13696 = 32 · 428 included.

    Raises:
        ConfigError: ``n`` is below 1.
    """
    if n < 1:
        raise ConfigError(f"a size must be positive, got {n}")
    return max(d for d in _divisors(n) if is_order(d))


@cache
def kronecker_factors(order: int) -> tuple[int, ...]:
    """The orders ``f1 ≤ f2 ≤ ...`` whose Kronecker product, in this order, is ``matrix(order)``.

    They are the splitting with the least ``f1 + f2 + ... + 64 · (number of factors)``: one factor up to 80, two
    balanced ones up to about 2800 (1536 → 32 × 48), and three beyond (14336 → 16 × 28 × 32). They depend on the order
    alone.

    Raises:
        ConfigError: no matrix of this order can be built.
    """
    _check_order(order)
    return min(_splittings(order, 1), key=lambda factors: (sum(factors) + _PASS_COST * len(factors), factors))


def matrix(order: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The ±1 matrix ``H``, shape (order, order), with ``H Hᵀ = order · I``.

    Raises:
        ConfigError: no matrix of this order can be built.
    """
    factors = kronecker_factors(order)
    dense = _irreducible(factors[0]) if len(factors) == 1 else _kronecker([matrix(f, torch.int8) for f in factors])
    return dense.to(device=device, dtype=dtype)


def factor_matrices(order: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """``matrix(f)`` for each ``f`` of ``kronecker_factors(order)``, whose Kronecker product is ``matrix(order)``.

    Raises:
        ConfigError: no matrix of this order can be built.
    """
    return tuple(matrix(factor, dtype) for factor in kronecker_factors(order))


def flops(order: int) -> int:
    """Multiplications and additions of :func:`hadamard_transform` for one vector of length ``order``."""
    return 2 * order * sum(kronecker_factors(order))


def hadamard_transform(
    x: Tensor,
    order: int,
    *,
    transpose: bool = False,
    dim: int = -1,
    diagonal: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``x R`` along ``dim`` for ``R = diag(diagonal) · (I ⊗ H) / √order``, or ``x Rᵀ``, its inverse if it is of signs.

    Args:
        x: float16, bfloat16, float32 or float64, of any shape and strides. The size of ``dim`` is a multiple of
            ``order``, and contiguous blocks of ``order`` elements are transformed each for itself.
        order: a Hadamard order, see :func:`is_order`.
        transpose: multiply by Rᵀ.
        dim: the axis that is transformed.
        diagonal: ±1 or scales, one per element of ``dim``. None stands for ones.
        compute: float32 or float64, the precision of the arithmetic. None takes that of ``x``, and float32 for float16
            and bfloat16. Autocast has no influence. The result is rounded to the dtype of ``x`` once, at the end.

    Returns:
        A new contiguous tensor of the shape, dtype and device of ``x``, differentiable with respect to it. Temporaries
        take a few MB on a CPU whatever the size of ``x``, unless a gradient is asked for.

    Raises:
        ConfigError: an unknown order, a size it does not divide, or a dtype that is not floating point.
    """
    check(x, order, dim)
    left = _scaled_factors(order, precision_of(x, compute), x, transpose)
    before, after = (None, diagonal) if transpose else (diagonal, None)
    return multiply(x, left, dim=dim, before=before, after=after, compute=compute)


def multiply(
    x: Tensor,
    left: Sequence[Tensor],
    *,
    dim: int = -1,
    before: Tensor | None = None,
    after: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``x · diag(before) · (I ⊗ F1 ⊗ F2 ...) · diag(after)`` along ``dim`` for any square factors.

    ``left`` are F1ᵀ, F2ᵀ, ... in the precision of the arithmetic (:func:`precision_of`). The product of their sizes
    divides the size of ``dim``. ``before`` and ``after`` have one element for each of ``dim``; None stands for ones.
    The result and the temporaries are as for :func:`hadamard_transform`, and it is differentiable with respect to the
    factors as well.
    """
    dim %= x.dim()
    precision, device = precision_of(x, compute), x.device
    source = x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
    first, last = (None if d is None else d.to(device, precision)[:, None] for d in (before, after))

    def product(part: Tensor) -> Tensor:
        part = part.to(precision) if first is None else part.to(precision) * first
        part = _multiply(part, left)
        return part if last is None else part * last

    has_autocast = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        return _in_chunks(source, product, precision, learns=_learns(source, *left)).view(x.shape)


def precision_of(x: Tensor, compute: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the arithmetic on ``x``: ``compute`` if given, else that of ``x`` but never less than float32."""
    return compute or (torch.float64 if x.dtype == torch.float64 else torch.float32)


def check(x: Tensor, order: int, dim: int = -1) -> None:
    """Raise ConfigError unless :func:`hadamard_transform` accepts these arguments. Only shape and dtype are read."""
    _check_order(order)
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise ConfigError(f"a Hadamard transform takes float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[dim] % order:
        raise ConfigError(f"order {order} does not divide axis {dim} of a tensor of shape {tuple(x.shape)}")


# The product with the factors.


def _learns(*tensors: Tensor) -> bool:
    """Whether a gradient is asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _in_chunks(
    source: Tensor, product: Callable[[Tensor], Tensor], precision: torch.dtype, *, learns: bool
) -> Tensor:
    """``product`` of ``source`` (before, size, after), a chunk of the first and last axes at a time.

    What ``learns`` is done at once, because chunks that are written into one tensor are copied for each gradient.
    """
    before, size, after = source.shape
    chunk = _CHUNK_BYTES.get(source.device.type, _CHUNK_BYTES_ELSEWHERE) // precision.itemsize
    if source.numel() <= chunk or learns:
        return product(source).to(source.dtype)
    columns = min(after, max(1, chunk // size))
    rows = max(1, chunk // (size * columns))
    out = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    for i, j in itertools.product(range(0, before, rows), range(0, after, columns)):
        out[i : i + rows, :, j : j + columns] = product(source[i : i + rows, :, j : j + columns])
    return out


def _multiply(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x (before, size, after) times each factor on its own axis; the factors are left operands, already transposed."""
    shape, after = x.shape, x.shape[2]
    for factor in reversed(factors):
        f = factor.shape[0]
        before = x.numel() // (f * after) if after else 0
        if after == 1:
            x = x.reshape(before, f) @ factor.t()
        else:
            x = torch.bmm(factor.expand(before, f, f), x.reshape(before, f, after))
        after *= f
    return x.view(shape)


_FACTORS: dict[tuple[int, torch.dtype, torch.device, bool], tuple[Tensor, ...]] = {}


def _scaled_factors(order: int, dtype: torch.dtype, like: Tensor, transpose: bool) -> tuple[Tensor, ...]:
    """The left operands of :func:`_multiply` (``H_fᵀ``, or ``H_f`` to transpose), the first one divided by ``√order``.

    Cached per order, dtype and device, but only as plain tensors for plain tensors: under a tracing mode what is built
    here is fake and belongs to that mode.
    """
    plain = type(like) in (Tensor, nn.Parameter)
    key = (order, dtype, like.device, transpose)
    if plain and key in _FACTORS:
        return _FACTORS[key]
    with torch.inference_mode(False), torch.no_grad():
        left = [h if transpose else h.t() for h in factor_matrices(order)]
        left[0] = left[0] / math.sqrt(order)
        factors = tuple(h.to(dtype=dtype, device=like.device).contiguous() for h in left)
    if plain and all(type(h) is Tensor for h in factors):
        _FACTORS[key] = factors
    return factors


# The matrices.


def _irreducible(order: int) -> Tensor:
    """The int8 matrix of an order that is not split.

    It is Sylvester's for a power of two, else one that :mod:`.constructions` knows, else a Kronecker product with one.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8, device="cpu")
    if constructions.is_constructible(order) and order.bit_count() > 1:
        return constructions.construct(order)
    first = next(d for d in _divisors(order) if constructions.is_constructible(d) and is_order(order // d))
    return torch.kron(constructions.construct(first), _irreducible(order // first))


def _kronecker(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = torch.kron(product, factor)
    return product


def _check_order(order: int) -> None:
    if not is_order(order):
        known = f"; the largest known order that divides it is {largest_order(order)}" if order > 0 else ""
        raise ConfigError(f"no Hadamard matrix of order {order} can be built{known}")


def _splittings(order: int, least: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``order`` as an ascending product of Hadamard orders of at least ``least``."""
    if least <= order <= constructions.LARGEST:
        yield (order,)
    for first in _divisors(order):
        if max(least, 2) <= first and first * first <= order and is_order(first) and is_order(order // first):
            yield from ((first, *rest) for rest in _splittings(order // first, first))


def _divisors(n: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]

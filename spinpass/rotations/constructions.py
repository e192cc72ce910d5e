"""Hadamard matrices that are no Kronecker products of smaller ones, each built from its published construction.

- Order ``q + 1`` for a prime power ``q = 3 (mod 4)``: Paley I (R. Paley, J. Math. Phys. 12, 1933).
- Order ``2 (q + 1)`` for a prime power ``q = 1 (mod 4)``: Paley II (same paper).
- Order ``4 m`` from four rows of ±1 of length ``m`` whose periodic autocorrelations cancel, put into the
  Goethals-Seidel array (J. Goethals and J. Seidel, Canad. J. Math. 19, 1967). The rows are symmetric (J. Williamson,
  Duke Math. J. 11, 1944) or come from Turyn-type sequences of length ``n``, ``m = 3n - 1`` (R. Turyn, J. Combin.
  Theory A 16, 1974); the longest, ``n = 36``, give order 428 (H. Kharaghani and B. Tayfeh-Rezaie, J. Combin. Des.
  13, 2005).

The only literals are one line for each order that the Paley constructions leave out. With their Kronecker products
every multiple of 4 up to 264 is covered; the first one missing is 268.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST = 2048
"""No larger matrix is built. It would be applied as one dense product, which costs what a rotation must not cost."""

# Turyn-type sequences X, Y, Z of length n and W of length n - 1, keyed by the order 4 (3n - 1). Digit i holds their
# elements i, X in the highest bit and W in the lowest, 1 for -1; the last digit has no W. Published by Kharaghani and
# Tayfeh-Rezaie, 2005 (n = 36), and by D. Best, D. Djokovic, H. Kharaghani and H. Ramp, arXiv 1206.4107 (the others).
_TURYN_TYPE = {
    92: "06e5c4d1",
    116: "0001f4a961",
    188: "0000778e52de5561",
    236: "000038e2739c7a0b6951",
    260: "00000f702c71a9ad565961",
    356: "000000f70b106f9d427a25e9a96951",
    428: "060989975b685d8fc80750b21c0212eceb26",
}

# Williamson's symmetric rows of odd length m, keyed by the order 4 m: the bits are elements 1 .. (m - 1) / 2, highest
# first, 1 for -1; element 0 is +1 and element m - i equals element i. Published in M. Hall, Combinatorial Theory, 2nd
# edition, 1983 (m = 43), and S. London, PhD thesis, University of Illinois at Chicago, 2013 (m = 39).
_WILLIAMSON = {
    156: (0x1AFB3, 0x1975B, 0x0ECF5, 0x72BE2),
    172: (0x0E16CF, 0x05350B, 0x081EB2, 0x1CC289),
}


@cache
def is_constructible(order: int) -> bool:
    """Whether :func:`construct` knows a matrix of this order, ``1 < order <= LARGEST``."""
    if order == 2:
        return True
    if order % 4 or not 4 <= order <= LARGEST:
        return False
    return order in _TURYN_TYPE or order in _WILLIAMSON or _is_paley_one(order) or _is_paley_two(order)


def construct(order: int) -> Tensor:
    """The ±1 matrix ``H`` (order, order), int8 on the CPU, with ``H Hᵀ = order I``. The order must be constructible."""
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    if _is_paley_one(order):
        return _paley_one(order - 1)
    if _is_paley_two(order):
        return _paley_two(order // 2 - 1)
    if order in _WILLIAMSON:
        return _goethals_seidel([_symmetric_row(bits, order // 4) for bits in _WILLIAMSON[order]])
    return _goethals_seidel(_rows_of_turyn_type(_TURYN_TYPE[order]))


# Paley: H from the quadratic character chi of the field with q elements, Q[i, j] = chi(i - j).


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and _prime_power(order - 1) is not None


def _is_paley_two(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1) is not None


def _paley_one(q: int) -> Tensor:
    """H = I + S with S = [[0, 1], [-1ᵀ, Q]]: Q is skew for q = 3 (mod 4), so S Sᵀ = q I and S + Sᵀ = 0."""
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    bordered[1:, 0] = -1
    bordered[1:, 1:] = _jacobsthal(q)
    bordered.diagonal()[1:] = 1
    return bordered


def _paley_two(q: int) -> Tensor:
    """H = S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]] with S = [[0, 1], [1ᵀ, Q]], symmetric for q = 1 (mod 4)."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    on = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(conference, off) + torch.kron(torch.eye(q + 1, dtype=torch.int8, device="cpu"), on)


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = chi(i - j), int8 (q, q). A field element is the integer whose base-p digits are its coordinates."""
    power = _prime_power(q)
    if power is None:
        raise ValueError(f"{q} is no prime power")
    p, k = power
    element = torch.arange(q, device="cpu")
    difference = torch.zeros(q, q, dtype=torch.int64, device="cpu")
    for weight in (p**i for i in range(k)):
        digit = element // weight % p
        difference += (digit[:, None] - digit[None, :]) % p * weight
    return torch.tensor(_quadratic_character(p, k), dtype=torch.int8, device="cpu")[difference]


def _quadratic_character(p: int, k: int) -> list[int]:
    """chi(0) = 0, chi(square) = 1, chi(other) = -1. The squares are the even powers of a generator of the field."""
    chi = [-1] * p**k
    chi[0] = 0
    for square in _powers_of_generator(p, k)[::2]:
        chi[square] = 1
    return chi


def _powers_of_generator(p: int, k: int) -> list[int]:
    """1, g, g², ... g^(q-2) for a generator g of GF(p^k).

    For k > 1, g = x modulo x^k - (c_0 + c_1 x + ...): the first coefficients under which the powers of x run through
    every nonzero element. That the orbit has q - 1 elements proves the polynomial primitive: no other check is needed.
    """
    q = p**k
    for candidate in range(2, q + 2):
        orbit = [1]
        while len(orbit) < q:
            orbit.append(_times(orbit[-1], candidate, p, k))
            if orbit[-1] in (0, 1):
                break
        if orbit[-1] == 1 and len(orbit) == q:
            return orbit[:-1]
    raise ValueError(f"GF({p}^{k}) has no generator: {p} is no prime")


def _times(element: int, candidate: int, p: int, k: int) -> int:
    """``element`` times the generator: an integer modulo p, or x modulo the polynomial with ``candidate``'s digits."""
    if k == 1:
        return element * candidate % p
    overflow, rest = divmod(element, p ** (k - 1))
    shifted = rest * p
    return sum((shifted // p**i + overflow * (candidate // p**i)) % p * p**i for i in range(k))


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


# Goethals-Seidel: four rows a, b, c, d of ±1 with A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4m I for their circulants.


def _symmetric_row(bits: int, m: int) -> Tensor:
    half = [1 - 2 * (bits >> i & 1) for i in reversed(range((m - 1) // 2))]
    return torch.tensor([1, *half, *reversed(half)], dtype=torch.int8, device="cpu")


def _rows_of_turyn_type(digits: str) -> list[Tensor]:
    """The rows (ZW, X), (ZW, -X), (Z-W, Y), (Z-W, -Y), juxtaposed: lengths n + (n - 1) + n = 3n - 1.

    Their autocorrelations add up to 2 (2 N_Z + 2 N_W + N_X + N_Y), which is zero at every shift for Turyn-type X to W.
    """
    values = [int(digit, 16) for digit in digits[:-1]] + [2 * int(digits[-1], 16)]
    signs = torch.tensor([[1 - 2 * (v >> b & 1) for v in values] for b in (3, 2, 1, 0)], dtype=torch.int8, device="cpu")
    x, y, z, w = signs[0], signs[1], signs[2], signs[3, :-1]
    return [torch.cat(parts) for parts in ((z, w, x), (z, w, -x), (z, -w, y), (z, -w, -y))]


def _goethals_seidel(rows: list[Tensor]) -> Tensor:
    """[[A, BR, CR, DR], [-BR, A, DᵀR, -CᵀR], [-CR, -DᵀR, A, BᵀR], [-DR, CᵀR, -BᵀR, A]], R the reversal of columns."""
    a, b, c, d = (_circulant(row) for row in rows)
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    btr, ctr, dtr = b.t().flip(1), c.t().flip(1), d.t().flip(1)
    blocks = ((a, br, cr, dr), (-br, a, dtr, -ctr), (-cr, -dtr, a, btr), (-dr, ctr, -btr, a))
    return torch.cat([torch.cat(line, 1) for line in blocks])


def _circulant(row: Tensor) -> Tensor:
    index = torch.arange(len(row), device="cpu")
    return row[(index[None, :] - index[:, None]) % len(row)]

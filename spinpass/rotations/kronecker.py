"""Kronecker products of small invertible matrices:  A = F1 ⊗ F2 ⊗ …,  applied without being formed.

    x A,   x A⁻¹ = x (F1⁻¹ ⊗ F2⁻¹ ⊗ …),   x A⁻ᵀ,   x Aᵀ

A product costs n (f1 + f2 + …) multiplications for vectors of n = f1·f2·… elements, as that with a Hadamard matrix of
the same factors does. Sources: affine transforms of this form before linear layers, Sun et al., FlatQuant, arXiv
2410.09426; the mixed-product property, Van Loan, J. Comput. Appl. Math. 123, 2000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spinpass.errors import ConfigError

_ORTHOGONAL = 1e-12  # max |F Fᵀ − I| of a factor that is orthogonal to float64

ORTHOGONAL_WITHIN = {torch.float32: 1e-4, torch.float64: 1e-8}
"""The same of a matrix that somebody gives as an orthogonal one."""


def checked_factors(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the factors as float64 on the CPU.

    Raises ConfigError: there is none, one is not square, not float, not finite, or cannot be inverted.
    """
    if isinstance(factors, Tensor) or not factors:
        raise ConfigError("a Kronecker product needs at least one factor, in a list")
    made: list[Tensor] = []
    for number, given in enumerate(factors, 1):
        if not isinstance(given, Tensor) or not is_square(given):
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ConfigError(f"factor {number} must be a square matrix that is not empty, got {found}")
        exact = in_float64(given, f"factor {number}")
        if not has_inverse(exact):
            raise ConfigError(f"factor {number} has no inverse, or values that are no numbers")
        made.append(exact)
    return tuple(made)


def in_float64(given: Tensor, what: str) -> Tensor:
    """Return a copy of a tensor of the user's, float64 on the CPU, contiguous and without gradients.

    Raises ConfigError: it is not float32 or float64, or holds no plain values, as a sparse one, or one on ``meta``.
    """
    if given.dtype not in ORTHOGONAL_WITHIN:
        raise ConfigError(f"{what} must be float32 or float64, got {given.dtype}")
    if given.layout != torch.strided or given.is_meta:
        raise ConfigError(f"{what} must be a plain tensor with its values, got one of {given.layout} on {given.device}")
    return given.detach().to(device="cpu", dtype=torch.float64, copy=True).contiguous()


def is_square(matrix: Tensor) -> bool:
    """Whether a tensor is a square matrix that is not empty."""
    return matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] and len(matrix) > 0


def has_inverse(matrix: Tensor) -> bool:
    """Whether a square matrix has finite values, and so has its inverse."""
    return bool(matrix.isfinite().all()) and math.isfinite(_condition(matrix))


def condition_of(factors: Sequence[Tensor]) -> float:
    """The condition number of A in the 2-norm, which is the product of those of its factors."""
    return math.prod(_condition(factor) for factor in factors)


def are_orthogonal(factors: Sequence[Tensor]) -> bool:
    """Whether every factor is orthogonal to float64."""
    return all(non_orthogonality(factor) <= _ORTHOGONAL for factor in factors)


def non_orthogonality(matrix: Tensor) -> float:
    """max |M Mᵀ − I|."""
    return float((matrix @ matrix.t() - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)).abs().max())


def right_operands(factors: Sequence[Tensor], *, inverse: bool, dual: bool) -> list[Tensor]:
    """The factors of what a row vector is multiplied by from the right.

    A; with ``inverse`` A⁻¹; with ``dual`` A⁻ᵀ, the basis in which products with vectors of the other stay what they
    are; with both Aᵀ.
    """
    made = [torch.linalg.inv(factor) if inverse != dual else factor for factor in factors]
    return [factor.t() if dual else factor for factor in made]


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz steps M <- M (3 I - Mᵀ M) / 2, each of which squares the error, for as long as it gets smaller."""
    last = math.inf
    while (error := non_orthogonality(matrix)) < last / 2:
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.t() @ matrix)
        last = error
    return matrix.contiguous()

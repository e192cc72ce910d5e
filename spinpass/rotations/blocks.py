"""Matrices with a block for each part of a vector, and orders of channels, neither of them formed.

    A = diag(A1, A2, …),   x A = (x1 A1, x2 A2, …),   A⁻¹ = diag(A1⁻¹, A2⁻¹, …);      (x P)ⱼ = x[order[j]]

Blocks of one row are a diagonal: a scale for each channel.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from spinpass.errors import ConfigError

from . import hadamard
from .kronecker import condition_of, has_inverse, in_float64, non_orthogonality

_ORTHOGONAL = 1e-12  # max |A Aᵀ − I| of a block that is orthogonal to float64
_INDEX = (torch.int64, torch.int32)


def checked_blocks(blocks: Tensor) -> Tensor:
    """Return the blocks (count, n, n) as float64 on the CPU; of a vector (count,) the blocks of one row.

    Raises ConfigError: they have another shape, are not float32 or float64, not finite, or one has no inverse.
    """
    wrong = not isinstance(blocks, Tensor) or blocks.dim() not in (1, 3) or not blocks.numel()
    if wrong or (blocks.dim() == 3 and blocks.shape[1] != blocks.shape[2]):
        found = tuple(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ConfigError(f"matrices for each head are (heads, n, n), and scales (n,); got {found}")
    exact = in_float64(blocks, "a tensor of matrices for each head, or of scales,")
    exact = exact.view(-1, 1, 1) if exact.dim() == 1 else exact
    for place, block in enumerate(exact):
        if not has_inverse(block):
            what = f"scale {place + 1}" if exact.shape[1] == 1 else f"the matrix of head {place + 1}"
            raise ConfigError(f"{what} has no inverse, or values that are no numbers")
    return exact


def checked_scales(scales: Tensor) -> Tensor:
    """Return scales (n,) as float64 on the CPU.

    Raises ConfigError: they have another shape, are not float32 or float64, or one is 0 or no number.
    """
    if not isinstance(scales, Tensor) or scales.dim() != 1:
        found = tuple(scales.shape) if isinstance(scales, Tensor) else type(scales).__name__
        raise ConfigError(f"scales are a vector (n,), one for each channel; got {found}")
    return checked_blocks(scales).flatten()


def checked_order(order: Tensor) -> Tensor:
    """Return a permutation as int64 (n,) on the CPU. Raises ConfigError: it is none, or of another dtype."""
    plain = isinstance(order, Tensor) and order.layout == torch.strided and not order.is_meta
    if not plain or order.dim() != 1 or order.dtype not in _INDEX:
        found = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        found += "" if plain else " without plain values"
        raise ConfigError(f"an order of channels is an int64 tensor (n,), got {found}")
    exact = order.detach().to(device="cpu", dtype=torch.int64, copy=True).contiguous()
    if not len(exact) or not torch.equal(exact.sort().values, torch.arange(len(exact), device="cpu")):
        raise ConfigError(f"the order of {len(exact)} channels does not have each of 0 … {len(exact) - 1} once")
    return exact


def block_condition(blocks: Tensor) -> float:
    """The largest condition number of a block in the 2-norm. The blocks' sizes beside each other round nothing."""
    return max(condition_of([block]) for block in blocks)


def blocks_are_orthogonal(blocks: Tensor) -> bool:
    """Whether every block is orthogonal to float64."""
    return all(non_orthogonality(block) <= _ORTHOGONAL for block in blocks)


def multiply_blocks(
    x: Tensor,
    blocks: Tensor,
    dim: int,
    *,
    inverse: bool = False,
    dual: bool = False,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``x A`` along ``dim``, with ``inverse`` ``x A⁻¹``, with ``dual`` ``x A⁻ᵀ``, with both ``x Aᵀ``.

    ``blocks`` are (count, n, n), and the size of ``dim`` is a multiple of count · n. The result is as for
    :func:`spinpass.rotations.hadamard.multiply`, differentiable with respect to x and the blocks.
    """
    right = torch.linalg.inv(blocks) if inverse != dual else blocks
    right = (right.mT if dual else right).to(x.device, hadamard.precision_of(x, compute))
    parts = torch.unflatten(x.movedim(dim, -1), -1, (-1, *right.shape[:2]))
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        if right.shape[1] == 1:
            made = parts.to(right.dtype) * right[:, 0]
        else:
            made = torch.einsum("...hi,hij->...hj", parts.to(right.dtype), right)
    found: Tensor = made.flatten(-3).movedim(-1, dim).to(x.dtype).contiguous()
    return found


def take_order(x: Tensor, order: Tensor, dim: int, *, inverse: bool) -> Tensor:
    """``x P`` along ``dim``: channel j is channel ``order[j]`` of x; with ``inverse`` the way back."""
    at = (order.argsort() if inverse else order).to(x.device)
    vectors = torch.unflatten(x.movedim(dim, -1), -1, (-1, len(order)))
    return vectors[..., at].flatten(-2).movedim(-1, dim).contiguous()

"""Rounding of computed values, as operators of the graph:  x ≈ (q − z)·s, returned in the dtype of x.

- ``spinpass::round_tokens(x, bits, symmetric, clip)`` takes a range for every vector of the last axis as it comes:
  ``clip`` times that of its values.
- ``spinpass::round_tensor(x, scale, zero, bits)`` takes one given range, or one for each channel of the last axis.
- ``spinpass::round_rows(x, scale, zero, limit, bits)`` does the same to x/k, times k, with k = max(1, max|x|/limit) for
  every vector of the last axis. A token far above all others (the first of a text, as a rule) is scaled into the range,
  instead of being cut or stretching it for the rest.

The arithmetic is in float32, or in float64 for float64. Importing this module registers the operators. They simulate:
an integer kernel computes the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op(
    "spinpass::round_tokens", mutates_args=(), schema="(Tensor x, int bits, bool symmetric, float clip=1.0) -> Tensor"
)
def round_tokens(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    """Round every vector of the last axis of a float x in its own range. The result has the shape and dtype of x.

    If symmetric, the codes are −2^(bits−1)+1 … 2^(bits−1)−1 and the scale is clip·max|x| / (2^(bits−1)−1). Otherwise
    the codes are 0 … 2^bits−1 over clip·min(x, 0) … clip·max(x, 0).
    """
    return torch.empty_like(x).copy_(tokens_formula(x, bits, symmetric, clip))


@torch.library.custom_op(
    "spinpass::round_tokens_within",
    mutates_args=(),
    schema="(Tensor x, int bits, bool symmetric, Tensor clip) -> Tensor",
)
def round_tokens_within(x: Tensor, bits: int, symmetric: bool, clip: Tensor) -> Tensor:
    """Do as :func:`round_tokens` for a share ``clip``, float (), that is a value of the graph, as one that learns."""
    return torch.empty_like(x).copy_(tokens_formula(x, bits, symmetric, clip))


def tokens_formula(x: Tensor, bits: int, symmetric: bool, clip: float | Tensor = 1.0) -> Tensor:
    """Return what :func:`round_tokens` does, in operators of torch alone, with strides of its own."""
    wide = _wide(x)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = wide.abs().amax(-1, keepdim=True) * clip / top
        scale = torch.where(scale > 0, scale, 1.0)
        result = (wide / scale).round_().clamp_(-top, top).mul_(scale)
    else:
        top = 2**bits - 1
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) * clip / top
        scale = torch.where(scale > 0, scale, 1.0)
        zero = (-low * clip / scale).round_()
        result = (wide / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)
    return result.to(x.dtype)


@torch.library.custom_op(
    "spinpass::round_tensor", mutates_args=(), schema="(Tensor x, Tensor scale, Tensor zero, int bits) -> Tensor"
)
def round_tensor(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round a float x (…, channels) to codes 0 … 2^bits − 1. The result has the shape and dtype of x.

    ``scale`` and ``zero`` are scalars or (channels,).
    """
    return torch.empty_like(x).copy_(tensor_formula(x, scale, zero, bits))


def tensor_formula(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return what :func:`round_tensor` does, in operators of torch alone, with strides of its own."""
    return (_wide(x) / scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale).to(x.dtype)


@torch.library.custom_op(
    "spinpass::round_rows",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor zero, float limit, int bits) -> Tensor",
)
def round_rows(x: Tensor, scale: Tensor, zero: Tensor, limit: float, bits: int) -> Tensor:
    """Round as :func:`round_tensor` does, with tokens above ``limit``, which may be infinite, scaled into the range."""
    return torch.empty_like(x).copy_(rows_formula(x, scale, zero, limit, bits))


def rows_formula(x: Tensor, scale: Tensor, zero: Tensor, limit: float, bits: int) -> Tensor:
    """Return what :func:`round_rows` does, in operators of torch alone, with strides of its own."""
    wide = _wide(x)
    factor = (wide.abs().amax(-1, keepdim=True) / limit).clamp_min(1)
    result = (wide / factor / scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale).mul_(factor)
    return result.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@round_tokens.register_fake
def _tokens_fake(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    return torch.empty_like(x)


@round_tokens_within.register_fake
def _(x: Tensor, bits: int, symmetric: bool, clip: Tensor) -> Tensor:
    return torch.empty_like(x)


@round_tensor.register_fake
def _tensor_fake(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


@round_rows.register_fake
def _rows_fake(x: Tensor, scale: Tensor, zero: Tensor, limit: float, bits: int) -> Tensor:
    return torch.empty_like(x)

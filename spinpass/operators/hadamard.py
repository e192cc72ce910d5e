"""The online part of a rotation: the op ``spinpass::hadamard(Tensor x, int order, bool transpose=False) -> Tensor``.

It is opaque to tracing (one node, whatever the order), differentiable, and runs on any device that has matrix products.
Importing this module registers it. The mathematics is in :mod:`spinpass.rotations.hadamard`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spinpass.rotations import hadamard

HADAMARD = "spinpass::hadamard"


@torch.library.custom_op(HADAMARD, mutates_args=(), schema="(Tensor x, int order, bool transpose=False) -> Tensor")
def hadamard_op(x: Tensor, order: int, transpose: bool = False) -> Tensor:
    """``x · (I ⊗ H) / √order`` along the last axis, or its inverse ``x · (I ⊗ Hᵀ) / √order`` with ``transpose``.

    The result has the shape and dtype of ``x``. Its strides are those that ``torch.empty_like(x)`` has.

    Raises:
        ConfigError: an unknown order, a last axis it does not divide, or a dtype that is not floating point.
    """
    result = hadamard.hadamard_transform(x, order, transpose=transpose)
    kept = torch.empty_like(x)  # the strides of x: a view that could be taken of x can be taken of the result
    return result if result.stride() == kept.stride() else kept.copy_(result)


@hadamard_op.register_fake
def _fake(x: Tensor, order: int, transpose: bool = False) -> Tensor:
    hadamard.check(x, order)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    _, ctx.order, ctx.transpose = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """y = x R with orthogonal R, so dx = dy Rᵀ."""
    return hadamard_op(gradient, ctx.order, not ctx.transpose), None, None


hadamard_op.register_autograd(_backward, setup_context=_setup_context)


def reference(x: Tensor, order: int, transpose: bool = False) -> Tensor:
    """What :func:`hadamard_op` returns by its definition, with one dense product per block in the dtype of ``x``.

    It is slow, and made for tests and comparisons.
    """
    dense = hadamard.matrix(order, x.dtype, x.device) / math.sqrt(order)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // order, order)
    product = blocks @ (dense.t() if transpose else dense)
    return product.reshape(x.shape)

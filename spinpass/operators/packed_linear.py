"""Linear layers on packed codes, as operators of the graph.

``spinpass::packed_linear(x, qweight, scales, qzeros, g_idx, bias, bits)``:  y = x Ŵᵀ + b,  Ŵ = (q − z)·s
``spinpass::round_weight(weight, scales, qzeros, g_idx, bits)``:  Ŵ of the codes that are nearest to a float weight

The constants lie as in a GPTQ checkpoint:

- ``qweight``, int32 (in·bits/32, out), holds the codes q.
- ``scales``, float (groups, out), holds s.
- ``qzeros``, int32 (groups, out·bits/32), holds the zero points z themselves.
- ``g_idx``, int32 (in,), has the group of every column. It is None for groups that lie side by side and are equally
  long but for the last.

Words that are not filled end in zeros. Importing this module registers both operators. They are made of torch's own,
and a weight is unpacked for as long as its product lasts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .words import unpack_words


@torch.library.custom_op(
    "spinpass::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, Tensor? bias, int bits) -> Tensor",
)
def packed_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """x (…, in) -> (…, out) in the dtype of x.

    The weight is computed in the scales' dtype, cast once, and multiplied as ``aten::linear`` multiplies a float weight
    (out, in). Gradients for x, the bias and the scales are those of the dequantized form, ∂L/∂s = Σ ∂L/∂Ŵ·(q − z) over
    the group.
    """
    return linear_formula(x, qweight, scales, qzeros, g_idx, bias, bits)


def linear_formula(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """Return what :func:`packed_linear` does, in operators of torch alone: shifts, masks and ``aten::linear``."""
    weight = dequantized(qweight, scales, qzeros, g_idx, bits, x.shape[-1])
    return F.linear(x, weight.to(x.dtype), bias)


@torch.library.custom_op(
    "spinpass::round_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor scales, Tensor qzeros, Tensor? g_idx, int bits) -> Tensor",
)
def round_weight(weight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int) -> Tensor:
    """Ŵ of a float weight (out, in) that is rounded to codes, (out, in) in the scales' dtype.

    Gradients pass straight through the rounding: ∂L/∂w = ∂L/∂Ŵ where w lies within the grid and 0 outside, and
    ∂L/∂s = Σ ∂L/∂Ŵ·((q − z) − w/s), without w/s outside. Source: LSQ, Esser et al., arXiv 1902.08153, equation 3.
    """
    return weight_formula(weight, scales, qzeros, g_idx, bits)


def weight_formula(weight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int) -> Tensor:
    """Return what :func:`round_weight` does, in operators of torch alone."""
    step, zero = _spread(scales, qzeros, g_idx, bits, weight.shape[1])
    return (codes(weight, step, zero, bits) - zero) * step


@packed_linear.register_fake
def _linear_fake(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@round_weight.register_fake
def _weight_fake(weight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int) -> Tensor:
    return scales.new_empty(weight.shape)


def dequantized(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int, columns: int
) -> Tensor:
    """Ŵ = (q − z)·s, (out, in) contiguous in the scales' dtype, for ``in`` = ``columns``."""
    step, zero = _spread(scales, qzeros, g_idx, bits, columns)
    return ((_unpacked(qweight, bits, columns).to(scales.dtype) - zero) * step).contiguous()


def codes(weight: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes nearest to a weight, as floats in the scales' dtype. All tensors are (out, in)."""
    return (weight.to(step.dtype) / step + zero).round_().clamp_(0, 2**bits - 1)


def nearest(weight: Tensor, scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int) -> Tensor:
    """The codes, uint8 (out, in), that :func:`round_weight` rounds a float weight (out, in) to."""
    return codes(weight, *_spread(scales, qzeros, g_idx, bits, weight.shape[1]), bits).to(torch.uint8)


def _unpacked(qweight: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, uint8 (out, in)."""
    return unpack_words(qweight, bits, 0, columns).T


def _spread(scales: Tensor, qzeros: Tensor, g_idx: Tensor | None, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of every weight, (out, in), in the scales' dtype."""
    zeros = unpack_words(qzeros, bits, 1, scales.shape[1]).to(scales.dtype)
    if g_idx is not None:
        at = g_idx.long()
        return scales[at].T, zeros[at].T
    size = -(-columns // scales.shape[0])
    step, zero = (t.T[:, :, None].expand(-1, -1, size).flatten(1)[:, :columns] for t in (scales, zeros))
    return step, zero


def _groups(scales: Tensor, g_idx: Tensor | None, columns: int) -> Tensor:
    """The group of every column, int64 (in,)."""
    if g_idx is not None:
        return g_idx.long()
    return torch.arange(columns, device=scales.device) // -(-columns // scales.shape[0])


def _by_group(values: Tensor, scales: Tensor, g_idx: Tensor | None) -> Tensor:
    """(out, in) -> (groups, out): the sum over the columns of each group."""
    at = _groups(scales, g_idx, values.shape[1])
    return torch.zeros_like(scales).index_add_(0, at, values.T.to(scales.dtype))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, qzeros, g_idx, bias, ctx.bits = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, qweight, scales, qzeros, g_idx)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, qweight, scales, qzeros, g_idx = ctx.saved_tensors
    columns = x.shape[-1]
    flat, rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, columns)
    step, zero = _spread(scales, qzeros, g_idx, ctx.bits, columns)
    levels = _unpacked(qweight, ctx.bits, columns).to(scales.dtype) - zero
    to_x = gradient @ (levels * step).to(x.dtype) if ctx.needs_input_grad[0] else None
    to_scales = _by_group((flat.T @ rows).to(scales.dtype) * levels, scales, g_idx)
    return to_x, None, to_scales, None, None, flat.sum(0) if ctx.has_bias else None, None


def _weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scales, qzeros, g_idx, ctx.bits = inputs
    ctx.save_for_backward(weight, scales, qzeros, g_idx)


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales, qzeros, g_idx = ctx.saved_tensors
    step, zero = _spread(scales, qzeros, g_idx, ctx.bits, weight.shape[1])
    ratio = weight.to(step.dtype) / step
    inside = ((ratio + zero).round() >= 0) & ((ratio + zero).round() <= 2**ctx.bits - 1)
    off = codes(weight, step, zero, ctx.bits) - zero - ratio * inside
    return (gradient * inside).to(weight.dtype), _by_group(gradient * off, scales, g_idx), None, None, None


packed_linear.register_autograd(_linear_backward, setup_context=_linear_context)
round_weight.register_autograd(_weight_backward, setup_context=_weight_context)

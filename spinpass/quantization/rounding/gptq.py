"""GPTQ: columns become codes one after the other, and those still to come make up for the error.

    min ‖X Wᵀ − X Ŵᵀ‖² by columns:  with U the upper Cholesky factor of (XᵀX)⁻¹,
    e = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e·U_jk  for k > j

Then come the scales of least error for these codes, and again each column in turn, its error now known in full:

    ŵ_j ← nearest of the grid to  ŵ_j + ((W − Ŵ) XᵀX)_j / (XᵀX)_jj

Source: Frantar et al., arXiv 2210.17323, algorithm 1. The cyclic coordinate descent is that of QuantEase, arXiv
2309.01885.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..scheme import Weights
from .grid import Codes, chosen_range, to_codes, uneven_index

_BLOCK = 128


Factors = dict[tuple[float, bool], Tensor]
"""Of a Hessian: by damping and whether columns are ordered, the factor that GPTQ corrects by, of the weights' dtype."""


def rounded_by_gptq(matrix: Tensor, hessian: Tensor, scheme: Weights, factors: Factors | None = None) -> Codes:
    """The codes of a float32 matrix (out, in) that least change its outputs on inputs X.

    Inputs that are always zero get a unit diagonal: their weights are rounded to nearest. With ``act_order`` columns
    are taken by descending diagonal, groups stay where they are, and their ranges are chosen before.

    Args:
        matrix: W, float32 (out, in).
        hessian: XᵀX, float32 or float64 (in, in).
        scheme: its ``method`` does not matter.
        factors: those of this Hessian that are known; what is computed is added, for others that read the same inputs.
    """
    columns = matrix.shape[1]
    size = scheme.group_size or columns
    known: Factors = {} if factors is None else factors
    device = matrix.device
    work, group_of = matrix.clone(), torch.arange(columns, device=device) // size
    fixed: list[tuple[Tensor, Tensor]] = []
    order = torch.arange(columns, device=device)
    if scheme.act_order or scheme.group_size is None:
        parts = torch.split(matrix, size, 1)
        fixed = [chosen_range(part, scheme.of_group(group)) for group, part in enumerate(parts)]
    if scheme.act_order:
        diagonal = hessian.diagonal()
        order = torch.where(diagonal == 0, 1, diagonal).argsort(descending=True)
        work, group_of = work[:, order], group_of[order]
    key = (scheme.damping, scheme.act_order)
    if key not in known:
        factor = _inverse_factor(hessian, scheme.damping, order if scheme.act_order else None)
        known[key] = factor.to(matrix.dtype)
        del factor
    upper = known[key]
    q = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros_like(work[:, start:end])
        for j in range(start, end):
            group = int(group_of[j])
            if group == len(fixed):  # the group begins: its range is that of the weights as they are by now
                # columns of the group that lie in later blocks still miss this block's corrections, as in the original
                fixed.append(chosen_range(work[:, j : j + size], scheme.of_group(group)))
            scale, zero = fixed[group]
            column = work[:, j : j + 1]
            q[:, j : j + 1] = to_codes(column, scale, zero, scheme.width_of(group))
            left = (column - (q[:, j : j + 1] - zero[:, None]) * scale[:, None]) / upper[j, j]
            work[:, j:end] -= left * upper[j, j:end]
            errors[:, j - start : j - start + 1] = left
        work[:, end:] -= errors @ upper[start:end, end:]
    if scheme.act_order:
        q = q[:, order.argsort()]
    scales, zeros = (torch.stack(parts, 1) for parts in zip(*fixed))
    index = uneven_index(columns, size, device)
    bits, group_bits = scheme.widths(len(fixed))
    codes = Codes(q.to(torch.uint8), scales, zeros.to(torch.uint8), bits, scheme.symmetric, index, group_bits)
    return refined(matrix, codes, hessian, scheme.sweeps)


def refined(matrix: Tensor, codes: Codes, hessian: Tensor, sweeps: int) -> Codes:
    """Codes and scales of no larger ‖X(W − Ŵ)ᵀ‖² for the same zero points.

    Args:
        matrix: W, float32 (out, in).
        codes: those of Ŵ to begin with.
        hessian: XᵀX, float32 or float64 (in, in).
        sweeps: rounds of coordinate descent. 0 returns ``codes``.
    """
    if not sweeps:
        return codes
    aim = matrix.double() @ hessian.double()
    for _ in range(sweeps):
        codes = _descended(matrix, _rescaled(aim, codes, hessian), hessian)
    return _rescaled(aim, codes, hessian)


def _rescaled(aim: Tensor, codes: Codes, hessian: Tensor) -> Codes:
    """The scales of least error for the same codes: a linear least-squares problem for every row. ``aim`` is W·H."""
    rows, groups = codes.scales.shape
    at = codes.group_of
    z = codes.q.double() - codes.zeros.double()[:, at]
    h = hessian.double()
    right = _by_group(z * aim, at, groups)
    left = torch.zeros(rows, groups, groups, dtype=torch.float64, device=z.device)
    for group in range(groups):  # zᵀ H z between this group and the later ones
        inside = (at == group).nonzero()[:, 0]
        later = (at >= group).nonzero()[:, 0]
        if len(inside):
            with_later = (z[:, inside] @ h[inside][:, later]) * z[:, later]
            left[:, group, group:] = _by_group(with_later, at[later] - group, groups - group)
    left = left + left.triu(1).mT
    ridge = 1e-9 * left.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    left += ridge[:, None, None] * torch.eye(groups, dtype=torch.float64, device=z.device)
    before = codes.scales.double()
    change = torch.linalg.solve(left, right - (left @ before[:, :, None])[:, :, 0])
    after = (before + change).to(codes.scales.dtype)
    # a group whose codes all stand for zero has no best scale, and a negative one would leave the grid
    return replace(codes, scales=torch.where(after > 0, after, codes.scales))


def _by_group(values: Tensor, at: Tensor, groups: int) -> Tensor:
    """The sums (rows, groups) of the columns of each group."""
    rows, columns = values.shape
    length = columns // groups
    if torch.equal(at, torch.arange(columns, device=at.device) // max(1, length)):
        return values.reshape(rows, groups, length).sum(-1)
    return torch.zeros(rows, groups, dtype=values.dtype, device=values.device).index_add_(1, at, values)


def _descended(matrix: Tensor, codes: Codes, hessian: Tensor) -> Codes:
    """The codes where every column in turn is rounded anew to what makes up best for the errors of all others."""
    columns, at = matrix.shape[1], codes.group_of
    h = hessian.to(matrix.dtype)
    curvature = h.diagonal().clone()
    curvature[curvature <= 0] = 1
    top = codes.top.tolist()
    scales, zeros = codes.scales[:, at], codes.zeros.to(matrix.dtype)[:, at]
    q = codes.q.to(matrix.dtype)
    slope = (matrix - (q - zeros) * scales) @ h
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        changes = torch.empty(len(q), end - start, dtype=matrix.dtype, device=matrix.device)
        for j in range(start, end):
            scale = scales[:, j]
            moved = (q[:, j] + slope[:, j] / (curvature[j] * scale)).round_().clamp_(0, top[j])
            change = (moved - q[:, j]) * scale
            q[:, j] = moved
            slope[:, j:end] -= change[:, None] * h[j, j:end]
            changes[:, j - start] = change
        slope[:, end:] -= changes @ h[start:end, end:]
    return replace(codes, q=q.to(torch.uint8))


def _inverse_factor(hessian: Tensor, damping: float, order: Tensor | None) -> Tensor:
    """The upper Cholesky factor of (H + λ·mean(diag H))⁻¹; λ grows tenfold until the factor exists.

    It takes one matrix beside H, which LAPACK works in: columns lie side by side, so that torch makes no copy.
    """
    diagonal = hessian.diagonal().double()
    diagonal = torch.where(diagonal == 0, 1, diagonal)
    mean = diagonal.mean()
    while True:
        h = (hessian.to(torch.float64, copy=True) if order is None else hessian.double()[order][:, order]).mT
        h.diagonal().copy_((diagonal if order is None else diagonal[order]) + damping * mean)
        if _factored(h, upper=False):
            torch.cholesky_inverse(h, out=h)
            if _factored(h, upper=True):
                return h
        del h
        damping *= 10


def _factored(matrix: Tensor, *, upper: bool) -> bool:
    """Put the Cholesky factor in the place of a matrix; return whether it exists."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, failed))
    return not int(failed)

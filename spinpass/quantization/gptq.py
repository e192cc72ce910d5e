"""GPTQ: columns are rounded one after the other, and those still to come make up for the error.

    min ‖X Wᵀ − X Ŵᵀ‖² by columns:  with U the upper Cholesky factor of (XᵀX)⁻¹,
    e = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e·U_jk  for k > j

Source: Frantar et al., arXiv 2210.17323, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Weights
from .grid import Codes, chosen_range, to_codes

_BLOCK = 128


def gptq(matrix: Tensor, hessian: Tensor, scheme: Weights) -> Codes:
    """Quantize a float32 matrix (out, in) against XᵀX, float32 or float64 (in, in), of its inputs.

    Inputs that are always zero get a unit diagonal: their weights are rounded to nearest. With ``act_order`` columns
    are taken by descending diagonal, groups stay where they are, and their ranges are chosen before.
    """
    columns = matrix.shape[1]
    size = scheme.group_size or columns
    work, h = matrix.clone(), hessian.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    group_of = torch.arange(columns) // size
    fixed: list[tuple[Tensor, Tensor]] = []
    order = torch.arange(columns)
    if scheme.act_order or scheme.group_size is None:
        fixed = [chosen_range(part, scheme) for part in torch.split(matrix, size, 1)]
    if scheme.act_order:
        order = diagonal.argsort(descending=True)
        work, h, group_of = work[:, order], h[order][:, order], group_of[order]
    upper = _inverse_factor(h, scheme.damping).to(matrix.dtype)
    q = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros_like(work[:, start:end])
        for j in range(start, end):
            group = int(group_of[j])
            if group == len(fixed):  # the group begins: its range is that of the weights as they are by now
                # columns of the group that lie in later blocks still miss this block's corrections, as in the original
                fixed.append(chosen_range(work[:, j : j + size], scheme))
            scale, zero = fixed[group]
            column = work[:, j : j + 1]
            q[:, j : j + 1] = to_codes(column, scale, zero, scheme.bits)
            left = (column - (q[:, j : j + 1] - zero[:, None]) * scale[:, None]) / upper[j, j]
            work[:, j:end] -= left * upper[j, j:end]
            errors[:, j - start : j - start + 1] = left
        work[:, end:] -= errors @ upper[start:end, end:]
    if scheme.act_order:
        q = q[:, order.argsort()]
    scales, zeros = (torch.stack(parts, 1) for parts in zip(*fixed))
    return Codes(q.to(torch.uint8), scales, zeros.to(torch.uint8), scheme.bits, scheme.symmetric)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of (H + λ·mean(diag H))⁻¹; λ grows tenfold until the factor exists."""
    mean = hessian.diagonal().mean()
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * eye)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return Tensor(upper)
        damping *= 10

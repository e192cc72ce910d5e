"""Codes with scales and zero points: rounding to nearest on the range of least squared error, and back.

A weight matrix is (out, in) and groups lie along ``in``:  w ≈ (q − z)·s,  with the code q and the zero point z in
0 … 2^bits − 1. Symmetric grids have z = 2^(bits−1) everywhere, so that −max … max·(1 − 2^(1−bits)) is covered and zero
is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scheme import ScaleDtype, Weights

_SHRUNK = 40  # ranges that are tried, from 100% of the largest weight downwards
_SMALLEST = 0.25  # of it: 2-bit grids cut deep


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: the codes of its elements, and what makes numbers of them.

    Args:
        q: the codes, uint8 (out, in).
        scales: float (out, groups).
        zeros: the zero points, uint8 (out, groups).
        bits: the width of a code, or the largest where widths differ.
        symmetric: all zero points are 2^(bits−1) and need not be stored.
        index: the group of every column, int64 (in,). None for groups that lie side by side and are equally long but
            for the last.
        group_bits: the width of the codes of each group where they differ.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    symmetric: bool
    index: Tensor | None = None
    group_bits: tuple[int, ...] | None = None

    @property
    def top(self) -> Tensor:
        """The largest code that every column could have, 2^bits − 1, int64 (in,)."""
        if self.group_bits is None:
            return torch.full(self.q.shape[1:], 2**self.bits - 1, device=self.q.device)
        return 2 ** torch.tensor(self.group_bits, device=self.q.device)[self.group_of] - 1

    @property
    def group_of(self) -> Tensor:
        """The group of every column, int64 (in,)."""
        return group_of(self.q.shape[1], self.scales.shape[1], self.index, self.q.device)

    @property
    def group_length(self) -> int | None:
        """How many columns every group but the last has; None where groups do not lie side by side."""
        columns, groups = self.q.shape[1], self.scales.shape[1]
        if self.index is None:
            return -(-columns // groups)
        length = int((self.index == 0).sum())
        side_by_side = torch.arange(columns, device=self.index.device) // max(1, length)
        return length if length and torch.equal(self.index, side_by_side) else None

    def dequantized(self) -> Tensor:
        """(q − z)·s in the scales' dtype, (out, in): one product per weight, as a kernel computes it."""
        at = self.group_of
        return (self.q.to(self.scales.dtype) - self.zeros.to(self.scales.dtype)[:, at]) * self.scales[:, at]

    def in_steps_of(self, dtype: torch.dtype, narrow: ScaleDtype) -> Codes:
        """The codes with scales that are numbers of a dtype too, which kernels in that dtype read; theirs is kept.

        They are numbers of ``narrow`` as well, so that a file can store two bytes for each, unless that is float16 and
        does not hold all of them at its full precision.
        """
        scales = self.scales.to(dtype)
        if narrow == "bfloat16":
            scales = scales.bfloat16()
        elif dtype.itemsize > 2 and _fits_half(scales):
            scales = scales.half()
        return replace(self, scales=scales.to(self.scales.dtype))

    @property
    def stored_scales(self) -> Tensor:
        """The scales as a file needs them: float16 where they are numbers of it, else as they are."""
        halves = self.scales.half()
        return halves if torch.equal(halves.to(self.scales.dtype), self.scales) else self.scales

    def on(self, device: torch.device) -> Codes:
        """The codes on a device."""
        index = None if self.index is None else self.index.to(device)
        q, scales, zeros = (tensor.to(device) for tensor in (self.q, self.scales, self.zeros))
        return replace(self, q=q, scales=scales, zeros=zeros, index=index)

    def rows(self, rows: slice | Tensor) -> Codes:
        """The codes of some rows of the matrix."""
        return replace(self, q=self.q[rows], scales=self.scales[rows], zeros=self.zeros[rows])

    @property
    def nbytes(self) -> int:
        """The size when packed: ``bits`` for each weight and each zero point that is stored, and the scales."""
        if self.group_bits is not None:
            return sum(codes.nbytes for _, codes in self.parts().values())
        zeros = 0 if self.symmetric else self.zeros.numel() * self.bits // 8
        return self.q.numel() * self.bits // 8 + self.stored_scales.nbytes + zeros

    def parts(self) -> dict[int, tuple[Tensor, Codes]]:
        """By width, ascending: the columns whose groups have it, int64 (n,), and their codes, all of this width."""
        device = self.q.device
        widths = torch.tensor(self.group_bits or [self.bits] * self.scales.shape[1], device=device)
        found = {}
        for bits in sorted(set(widths.tolist())):
            groups = (widths == bits).nonzero()[:, 0]
            columns = torch.isin(self.group_of, groups).nonzero()[:, 0]
            at = torch.searchsorted(groups, self.group_of[columns])
            index = None if torch.equal(at, group_of(len(columns), len(groups), None, device)) else at
            kept = (self.q[:, columns], self.scales[:, groups], self.zeros[:, groups])
            found[bits] = (columns, Codes(*kept, bits, self.symmetric, index))
        return found


def stacked(parts: Iterable[Codes], rows: int) -> Codes:
    """The codes of the rows of all parts, ``rows`` together, which are of one scheme and width.

    Parts are taken one by one, so that those of an iterator need not stand beside what is made of them.
    """
    made: Codes | None = None
    at = 0
    for part in parts:
        if len(part.q) == rows:
            return part
        if made is None:
            q, scales, zeros = (t.new_empty(rows, *t.shape[1:]) for t in (part.q, part.scales, part.zeros))
            made = replace(part, q=q, scales=scales, zeros=zeros)
        for whole, own in ((made.q, part.q), (made.scales, part.scales), (made.zeros, part.zeros)):
            whole[at : at + len(own)] = own
        at += len(part.q)
    assert made is not None and at == rows
    return made


def rounded(matrix: Tensor, scheme: Weights) -> Codes:
    """Round a float matrix (out, in) to the nearest codes. The scales have its dtype. A last group may be shorter."""
    if scheme.group_bits is not None:
        return _rounded_by_group(matrix, scheme)
    out, columns = matrix.shape
    size = scheme.group_size or columns
    whole = columns - columns % size
    parts = [matrix[:, :whole].reshape(-1, size), matrix[:, whole:]]  # all groups of all rows at once
    found = [(*chosen_range(part, scheme), part) for part in parts if part.numel()]
    q = torch.cat([to_codes(part, s, z, scheme.bits).reshape(out, -1) for s, z, part in found], 1)
    scales, zeros = (torch.cat([each[k].reshape(out, -1) for each in found], 1) for k in (0, 1))
    index = uneven_index(columns, size, matrix.device)
    return Codes(q.to(torch.uint8), scales, zeros.to(torch.uint8), scheme.bits, scheme.symmetric, index)


def _rounded_by_group(matrix: Tensor, scheme: Weights) -> Codes:
    """Every group of columns at its own width."""
    assert scheme.group_size is not None  # the scheme has checked
    parts = torch.split(matrix, scheme.group_size, 1)
    found = [rounded(part, scheme.of_group(group)) for group, part in enumerate(parts)]
    q, scales, zeros = (torch.cat([getattr(codes, name) for codes in found], 1) for name in ("q", "scales", "zeros"))
    index = uneven_index(matrix.shape[1], scheme.group_size, matrix.device)
    bits, group_bits = scheme.widths(len(parts))
    return Codes(q, scales, zeros, bits, scheme.symmetric, index, group_bits)


def group_of(columns: int, groups: int, index: Tensor | None, device: torch.device) -> Tensor:
    """The group of every column, int64 (columns,): ``index``, or groups side by side, equally long but for the last."""
    return torch.arange(columns, device=device) // -(-columns // groups) if index is None else index


def uneven_index(columns: int, size: int, device: torch.device) -> Tensor | None:
    """The group of every column where groups of ``size`` leave a shorter one at the end; None where they do not."""
    return torch.arange(columns, device=device) // size if columns > size and columns % size else None


def chosen_range(part: Tensor, scheme: Weights) -> tuple[Tensor, Tensor]:
    """(scale, zero point), each float (rows,), of one group of each row (rows, size)."""
    levels = 2**scheme.bits - 1
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best_scale, best_zero = _grid(low, high, levels, scheme.symmetric)
    if not scheme.clip:
        return best_scale, best_zero
    least = _error(part, best_scale, best_zero, scheme.bits)
    for step in range(1, _SHRUNK):
        shrink = 1 - (1 - _SMALLEST) * step / _SHRUNK
        scale, zero = _grid(low * shrink, high * shrink, levels, scheme.symmetric)
        error = _error(part, scale, zero, scheme.bits)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def to_codes(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes 0 … 2^bits − 1 of values (rows, size), as floats, for a scale and zero point (rows,) of each row."""
    return (values / scale[:, None] + zero[:, None]).round_().clamp_(0, 2**bits - 1)


def _fits_half(scales: Tensor) -> bool:
    """Whether all of them are in the range in which float16 has eleven bits."""
    limits = torch.finfo(torch.float16)
    return bool(((scales >= limits.tiny) & (scales <= limits.max)).all())


def _grid(low: Tensor, high: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, (levels + 1) / 2) if symmetric else (-low / scale).round().clamp(0, levels)
    return scale, zero


def _error(part: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((to_codes(part, scale, zero, bits) - zero[:, None]) * scale[:, None] - part).square().sum(1)

"""A rounded weight that learns:  Ŵ = s·e^θ ∘ (clip(round(q + r + δ)) − round(z + ζ)).

r is how far the weight that was rounded lies from q, cut at ±0.4, so that a small move is enough where rounding was a
close call, and where GPTQ has taken another code than the nearest. With L = q + r + δ in steps of the grid,
z' = round(z + ζ), s' = s·e^θ and the gradient G of Ŵ, rounding passed straight through (Bengio et al., arXiv
1308.3432):

    dδ = s' ∘ G where L is within the grid      dζ = −s' ΣG      dθ = s' ΣG ∘ (round(L) − z')

with sums over a group. Sources: θ alone is PEQA's (Kim et al., arXiv 2305.14152), δ within ±½ AutoRound's (Cheng et
al., arXiv 2309.05516), here without a bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spinpass.learning import LearningPart

from ..kinds import LATENT, OFFSET, SCALE, ZERO
from ..report import QuantizedWeight
from ..rounding import Codes, laid_out
from ..scheme import FINE

_STEPS, _REST = 256, 0.4  # of r in a step of the grid, and the most of it: moves of 0.1 are noise
_RANK = 8  # of a move of low rank


@dataclass(frozen=True, eq=False)
class LearnedWeight:
    """The moves of one weight (:class:`spinpass.learning.LearningPart`).

    Args:
        weight: as it was rounded.
        places: the placeholders of the stored constant.
        shape: of the stored constant.
        dtype: of the stored constant.
        kinds: what is learned of it.
        rests: r (out, in) in steps of 1/256, int8; None for zeros.
    """

    weight: QuantizedWeight
    places: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    kinds: Collection[str]
    rests: Tensor | None = None
    moves: Mapping[str, Tensor] = field(init=False)
    depends: tuple[LearningPart, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        codes = self.weight.codes
        sizes = {SCALE.name: codes.scales.shape}
        if codes.bits < FINE:
            sizes[OFFSET.name] = codes.q.shape
            sizes[LATENT.name] = torch.Size([_RANK * sum(codes.q.shape)])
        if not codes.symmetric:
            sizes[ZERO.name] = codes.zeros.shape
        device = codes.q.device
        moves = {
            kind: torch.zeros(size, dtype=torch.float32, device=device).requires_grad_()
            for kind, size in sizes.items()
            if kind in self.kinds
        }
        object.__setattr__(self, "moves", moves)

    def value(self) -> Tensor:
        """Return Ŵ as the constant is stored."""
        codes, moves = self.weight.codes, self.moves
        scales = codes.scales.float()
        if SCALE.name in moves:
            scales = scales * moves[SCALE.name].exp()
        matrix: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            codes, scales, self._offsets(), moves.get(ZERO.name), self.rests
        )
        return laid_out(matrix, self.weight.dim, self.shape).contiguous().to(self.dtype)

    def _offsets(self) -> Tensor | None:
        """Return δ (out, in), of a move for each weight, of one of low rank A·B, or of both; None for neither."""
        found = self.moves.get(OFFSET.name)
        if LATENT.name not in self.moves:
            return found
        out, columns = self.weight.codes.q.shape
        a, b = torch.split(self.moves[LATENT.name], [_RANK * out, _RANK * columns])
        start = torch.randn(out, _RANK, generator=torch.Generator("cpu").manual_seed(0), device="cpu") / _RANK**0.5
        low: Tensor = (a.view(out, _RANK) + start.to(a.device)) @ b.view(_RANK, columns)
        return low if found is None else low + found

    def learned(self) -> QuantizedWeight:
        """Return the weight with what its moves have made of its codes."""
        codes, moves = self.weight.codes, {kind: move.detach() for kind, move in self.moves.items()}
        q, zeros, scales = codes.q, codes.zeros, codes.scales
        offsets = self._offsets()
        if offsets is not None:
            q = _levels(codes, offsets.detach(), self.rests).to(torch.uint8)
        if ZERO.name in moves:
            zeros = _zeros(codes, moves[ZERO.name]).to(torch.uint8)
        if SCALE.name in moves:
            scales = (scales.float() * moves[SCALE.name].exp()).to(scales.dtype)
        moved = replace(codes, q=q, zeros=zeros, scales=scales)
        return replace(self.weight, codes=moved.in_steps_of(self.dtype, self.weight.scheme.scales))


def rests_of(weight: Tensor, codes: Codes) -> Tensor:
    """How far a weight (out, in) lies from its codes, in steps of 1/256 of the grid, int8."""
    at = codes.group_of
    exact = weight.float() / codes.scales.float()[:, at] + codes.zeros[:, at].float()
    return (exact - codes.q).clamp_(-_REST, _REST).mul_(_STEPS).round_().to(torch.int8)


def _latent(codes: Codes, offsets: Tensor, rests: Tensor | None) -> Tensor:
    """q + r + δ."""
    level = offsets.add(codes.q)
    return level if rests is None else level.add_(rests, alpha=1 / _STEPS)


def _levels(codes: Codes, offsets: Tensor | None, rests: Tensor | None) -> Tensor:
    """The codes that weights are rounded to, as floats (out, in)."""
    if offsets is None:
        return codes.q.float()
    return _latent(codes, offsets, rests).round_().clamp_(0, 2**codes.bits - 1)


def _zeros(codes: Codes, moves: Tensor | None) -> Tensor:
    """The zero points, as floats (out, groups)."""
    return codes.zeros.float() if moves is None else moves.add(codes.zeros).round_().clamp_(0, 2**codes.bits - 1)


class _Rounded(torch.autograd.Function):
    """Ŵ (out, in) of codes, scales (out, groups) and moves, which keeps no more than these for the way back."""

    @staticmethod
    def forward(
        ctx: Any, codes: Codes, scales: Tensor, offsets: Tensor | None, zeros: Tensor | None, rests: Tensor | None
    ) -> Tensor:
        ctx.codes, ctx.moves = codes, (offsets, zeros, rests)
        ctx.save_for_backward(scales)
        matrix = _levels(codes, offsets, rests)
        _grouped(codes, matrix, lambda part, group: part.sub_(group), _zeros(codes, zeros))
        _grouped(codes, matrix, lambda part, group: part.mul_(group), scales)
        return matrix

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, (offsets, zeros, rests) = ctx.codes, ctx.moves
        (scales,) = ctx.saved_tensors
        by_scales = by_offsets = by_zeros = None
        if ctx.needs_input_grad[1]:
            distance = _levels(codes, offsets, rests)
            _grouped(codes, distance, lambda part, group: part.sub_(group), _zeros(codes, zeros))
            by_scales = _summed(codes, distance.mul_(gradient))
        if zeros is not None and ctx.needs_input_grad[3]:
            by_zeros = _summed(codes, gradient).mul_(scales).neg_()
        if offsets is not None and ctx.needs_input_grad[2]:
            by_offsets = gradient.clone()
            _grouped(codes, by_offsets, lambda part, group: part.mul_(group), scales)
            level = _latent(codes, offsets, rests)
            by_offsets.masked_fill_((level < -0.5) | (level > 2**codes.bits - 0.5), 0.0)
        return None, by_scales, by_offsets, by_zeros, None


def _grouped(codes: Codes, matrix: Tensor, apply: Any, group: Tensor) -> None:
    """Apply an operation in place to a matrix (out, in) and what each group of it has, (out, groups)."""
    count = group.shape[1]
    if codes.index is None and matrix.shape[1] % count == 0:
        apply(matrix.view(len(matrix), count, -1), group[:, :, None])
    else:
        apply(matrix, group[:, codes.group_of])


def _summed(codes: Codes, matrix: Tensor) -> Tensor:
    """The sums over each group of a matrix, (out, groups)."""
    count = codes.scales.shape[1]
    if codes.index is None and matrix.shape[1] % count == 0:
        return matrix.reshape(len(matrix), count, -1).sum(-1)
    return matrix.new_zeros(len(matrix), count).index_add_(1, codes.group_of, matrix)

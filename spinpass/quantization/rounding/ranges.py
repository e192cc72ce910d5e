"""Ranges of activations, chosen on calibration inputs.

    min over (scale, zero, limit)  Σ ‖x − k·round(x/k)‖²,      k = max(1, max|x|/limit) for every token

A massive activation is one token's. It is scaled into the range of the others where that lowers the error by much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinpass import operators
from spinpass.workers import Team

from ..scheme import Activations

_ROWS = 1024  # of the tokens that a range is chosen on, beside the largest
_LARGEST = 64  # tokens that a sample would miss
_RANGES, _SHRINK = 40, 0.9  # how many ranges are tried, and the ratio of one to the one before
_LIMITS = (0.99, 0.95)  # quantiles of the tokens' largest values
_FAR = 2.0  # times the limit: what a token must reach to be far above the others
_WORTH = 0.5  # a limit costs a maximum per token: it has to lower the error to this share
_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)


def median_peak(values: Sequence[Tensor], team: Team | None = None) -> float:
    """The median of the tokens' largest magnitudes, of values (…, channels)."""
    return float(_Tokens.of(values, team).peaks().median())


@dataclass(frozen=True)
class StaticRange:
    """A range that is fixed for all tokens.

    Args:
        scale: float32, a scalar or (channels,).
        zero: the zero point, likewise.
        limit: the largest value of a token that is not scaled into the range, infinite where none is.
    """

    scale: Tensor
    zero: Tensor
    limit: float


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all inputs in their order, of which each rank of a team has its own.

    Args:
        rows: this rank's, float32 (tokens here, channels).
        places: where each of them is among all, int64 (tokens here,).
        count: how many there are in all.
    """

    rows: Tensor
    places: Tensor
    count: int
    team: Team

    @classmethod
    def of(cls, values: Sequence[Tensor], team: Team | None) -> _Tokens:
        team = team or Team()
        parts = [v.reshape(-1, v.shape[-1]).float() for v in values]
        lengths = team.gathered([len(part) for part in parts])
        every = {team.size * k + rank: n for rank, each in enumerate(lengths) for k, n in enumerate(each)}
        starts, count = dict[int, int](), 0
        for k in sorted(every):
            starts[k], count = count, count + every[k]
        ends = {k: starts[k] + every[k] for k in starts}
        mine = [team.size * k + team.rank for k in range(len(parts))]
        own = [torch.arange(starts[k], ends[k], device=part.device) for k, part in zip(mine, parts, strict=True)]
        return cls(torch.cat(parts), torch.cat(own), count, team)

    def peaks(self) -> Tensor:
        """The largest magnitude of each token, (count,)."""
        found = torch.zeros(self.count, device=self.rows.device)
        found[self.places] = self.rows.abs().amax(1)
        return self.team.sum(found)  # of each place one rank has a value, and the others a zero

    def picked(self, at: Tensor) -> Tensor:
        """The tokens at some places, (len(at), channels)."""
        here = torch.full((self.count,), -1, device=at.device)
        here[self.places] = torch.arange(len(self.places), device=at.device)
        here = here[at]
        found = torch.zeros(len(at), self.rows.shape[-1], device=at.device)
        found[here >= 0] = self.rows[here[here >= 0]]
        return self.team.sum(found)


def static_range(values: Sequence[Tensor], scheme: Activations, team: Team | None = None) -> StaticRange:
    """The range for ``values``, each (…, channels), that the scheme's ``calibration`` chooses.

    Of a ``team`` each rank gives every so many-th of the values, as :meth:`.Team.dealt` deals them out, and all get the
    range that one process would, bit for bit.
    """
    tokens = _Tokens.of(values, team)
    peaks = tokens.peaks()
    sample = _Sample.of(tokens, peaks)
    best = _chosen(sample, scheme, math.inf)
    if scheme.per_channel:
        return best[0]
    if scheme.calibration != "mse" or not scheme.sinks:
        return best[0]
    for quantile in _LIMITS:
        limit = float(peaks.kthvalue(max(1, math.ceil(quantile * len(peaks)))).values)
        if 0 < _FAR * limit < float(peaks.max()):
            other = _chosen(sample, scheme, limit)
            best = other if other[1] < _WORTH * best[1] else best
    return best[0]


@dataclass(frozen=True)
class _Sample:
    """Some tokens (n, channels), the largest among them, and how many each stands for, float (n,)."""

    rows: Tensor
    counts: Tensor

    @classmethod
    def of(cls, tokens: _Tokens, peaks: Tensor) -> _Sample:
        large = peaks.topk(min(_LARGEST, tokens.count)).indices
        rest = torch.ones(tokens.count, dtype=torch.bool, device=peaks.device)
        rest[large] = False
        others = rest.nonzero()[:, 0]
        stride = max(1, -(-len(others) // _ROWS))
        picked = others[::stride]
        share = len(others) / max(1, len(picked))
        counts = torch.tensor([1.0] * len(large) + [share] * len(picked), device=peaks.device)
        return cls(tokens.picked(torch.cat([large, picked])), counts)


def token_clip(values: Sequence[Tensor], bits: int, symmetric: bool, team: Team | None = None) -> float:
    """The share of each token's range that is best covered, for ``values`` (…, channels) and codes of ``bits``.

    It is the one of least squared error relative to the token's power, summed over tokens. ``team``: as for
    :func:`static_range`.
    """
    tokens = _Tokens.of(values, team)
    step = max(1, tokens.count // _ROWS)
    rows = tokens.picked(torch.arange(0, tokens.count, step, device=tokens.rows.device))
    power = rows.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)

    def error(clip: float) -> float:
        off = operators.round_tokens(rows, bits, symmetric, clip) - rows
        return float((off.square().sum(1) / power).sum())

    return min(_CLIPS, key=error)


def _chosen(sample: _Sample, scheme: Activations, limit: float) -> tuple[StaticRange, float]:
    """The range of least squared error for a given limit, and its error. Each channel may have its own."""
    factor = (sample.rows.abs().amax(1, keepdim=True) / limit).clamp_min(1)
    scaled = sample.rows / factor
    low, high = _ends(scaled, scheme)
    top = 2**scheme.bits - 1
    best_scale, best_zero, least = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, math.inf)
    for step in range(_RANGES if scheme.calibration == "mse" else 1):
        shrink = _SHRINK**step
        scale = ((high - low) * shrink / top).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.full_like(low, (top + 1) / 2) if scheme.is_symmetric else (-low * shrink / scale).round()
        off = operators.round_tensor(scaled, scale, zero, scheme.bits) - scaled
        error = sample.counts @ (off * factor).square()
        error = error if scheme.per_channel else error.sum()
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return StaticRange(best_scale, best_zero, limit), float(least.sum())


def _ends(rows: Tensor, scheme: Activations) -> tuple[Tensor, Tensor]:
    """(low, high) of the widest range that is considered: scalars, or (channels,)."""
    columns = rows if scheme.per_channel else rows.reshape(-1, 1)
    if scheme.calibration == "percentile":
        outside = max(1, round(len(columns) * (1 - scheme.percentile / 100) / 2))
        low, high = (columns.kthvalue(k, 0).values for k in (outside, len(columns) + 1 - outside))
    else:
        low, high = columns.amin(0), columns.amax(0)
    if not scheme.per_channel:
        low, high = low[0], high[0]
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.is_symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high

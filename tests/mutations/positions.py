"""Positions: rotary in all spellings, ALiBi, relative, none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.mutations.hazard import SecondAttention, merged, param
from tests.support.decoders import HEAD, HEADS, KV, SEQ, Attention, RMSNorm, rope


def angles(size: int) -> Tensor:
    """(seq, size)."""
    return torch.arange(SEQ, dtype=torch.float64)[:, None] * 0.5 ** torch.arange(size, dtype=torch.float64)


class Turned(SecondAttention):
    """Queries and keys are turned by :meth:`turn`."""

    def turn(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged(self.a2.mixed(self.turn(q), self.turn(k), v))


class InterleavedRope(Turned):
    """Pairs of neighbouring channels are turned."""

    folds = True

    def turn(self, x: Tensor) -> Tensor:
        a = angles(HEAD // 2).repeat_interleave(2, -1)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * a.cos() + turned * a.sin()


class PairwiseRope(Turned):
    """The same with the pairs taken apart and put together."""

    folds = True

    def turn(self, x: Tensor) -> Tensor:
        a, (even, odd) = angles(HEAD // 2), x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()], -1).flatten(-2)


class ComplexRope(Turned):
    """The same as a product of complex numbers."""

    folds = True

    def turn(self, x: Tensor) -> Tensor:
        phases = torch.polar(torch.ones(SEQ, HEAD // 2, dtype=torch.float64), angles(HEAD // 2))
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * phases).flatten(-2)


class HalvesRope(Turned):
    """The halves computed apart and concatenated."""

    folds = True

    def turn(self, x: Tensor) -> Tensor:
        a, (left, right) = angles(HEAD // 2), x.chunk(2, -1)
        return torch.cat([left * a.cos() - right * a.sin(), right * a.cos() + left * a.sin()], -1)


class MiddleRope(Turned):
    """Some channels in the middle are turned, others not, and it is scaled."""

    folds = True

    def turn(self, x: Tensor) -> Tensor:
        a, (left, middle, right) = angles(2), x.split([1, 4, 3], -1)
        turned = torch.cat([-middle[..., 2:], middle[..., :2]], -1)
        middle = middle * a.cos().repeat(1, 2) + turned * a.sin().repeat(1, 2)
        return torch.cat([left, middle, right], -1) * 1.1


class RopeByMatrix(Turned):
    """A matrix per position."""

    folds = True

    def more(self) -> None:
        self.register_buffer("matrices", torch.linalg.qr(torch.randn(SEQ, HEAD, HEAD, dtype=torch.float64))[0])

    def turn(self, x: Tensor) -> Tensor:
        return torch.einsum("bhsd,sde->bhse", x, self.matrices)


class RopeOnNormedHeads(SecondAttention):
    """Scaled norms on the heads before the positions, a learned temperature per head behind them."""

    folds = True

    def more(self) -> None:
        self.qn, self.kn, self.heat = RMSNorm(HEAD), nn.LayerNorm(HEAD), param(HEADS, 1, 1)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged(self.a2.mixed(rope(self.qn(q)) * self.heat, rope(self.kn(k)), v))


class RopeOnValues(SecondAttention):
    """Values are turned too, and the result turned back."""

    folds = True
    reason = "R2 at .*multiplies channel by channel"

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged(self.a2.mixed(rope(q), rope(k), rope(v)))


class RopeOnTheStream(SecondAttention):
    """Positions turn the normed stream, before the projections."""

    def mix(self, h: Tensor) -> Tensor:
        a = angles(h.shape[-1] // 2)
        left, right = h.chunk(2, -1)
        q, k, v = self.a2.project(torch.cat([left * a.cos() - right * a.sin(), right * a.cos() + left * a.sin()], -1))
        return merged(self.a2.mixed(q, k, v))


class Alibi(SecondAttention):
    """Slopes per head times distances are added to the scores, causal and in a window."""

    folds = True

    def more(self) -> None:
        self.slopes = param(HEADS, 1, 1)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        at = torch.arange(SEQ)
        distance = (at[None] - at[:, None]).double()
        seen = (distance <= 0) & (distance > -3)
        scores = q @ k.transpose(-1, -2) / HEAD**0.5 + self.slopes * distance
        return merged(torch.where(seen, scores, torch.finfo(torch.float64).min).softmax(-1) @ v)


class RelativeTable(SecondAttention):
    """A table of biases by bucket of distance, shared by two layers (T5)."""

    folds = True

    def more(self) -> None:
        self.bias, self.a3 = nn.Embedding(9, HEADS), Attention(self.s)

    def mix(self, h: Tensor) -> Tensor:
        at = torch.arange(SEQ)
        bias = self.bias((at[None] - at[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)[None]
        total = 0.0
        for a in (self.a2, self.a3):
            q, k, v = a.project(h)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            total = total + merged((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v)
        return total


class RelativeKeys(SecondAttention):
    """Queries meet a projected table of distances as well, with two learned biases (Transformer-XL, DeBERTa)."""

    folds = True

    def more(self) -> None:
        self.table, self.by_distance = param(SEQ, 9), nn.Linear(9, HEADS * HEAD, bias=False)
        self.u, self.w = param(HEADS, 1, HEAD), param(HEADS, 1, HEAD)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        r = self.by_distance(self.table).view(SEQ, HEADS, HEAD).permute(1, 2, 0)
        scores = (q + self.u) @ k.transpose(-1, -2) + (q + self.w) @ r
        return merged(scores.softmax(-1) @ v)


class RelativeValues(SecondAttention):
    """A table of distances is added to the values that are mixed."""

    folds = True

    def more(self) -> None:
        self.table = param(SEQ, HEAD)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        weights = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).softmax(-1)
        return merged(weights @ v.repeat_interleave(2, 1) + weights @ self.table)


class ValuesAtPositions(SecondAttention):
    """A constant per position and channel is added to keys and values, per kv head."""

    folds = True

    def more(self) -> None:
        self.pk, self.pv = param(KV, SEQ, HEAD), param(SEQ, HEAD)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged(self.a2.mixed(q, k + self.pk, v + self.pv))

"""Scores: what is added to queries and keys, and what becomes of their products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, SecondAttention, merged, param
from tests.support.decoders import HEAD, HEADS, KV, SEQ, Attention, RMSNorm, Shape, rope


class TalkingHeads(Hazard):
    """Heads of the scores mixed before the softmax."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = param(HEADS, HEADS)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        w = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(2, 3), self.th).softmax(-1)
        return x + self.a2.o((w @ v).transpose(1, 2).flatten(2))


class HeadNormScaleQ(Hazard):
    """Per-channel scale on q only, no rope."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.qs = param(HEAD)
        self.ks = param(HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q * self.qs, k, v).transpose(1, 2).flatten(2))


class QKNormNoRope(Hazard):
    """Q and k normed, no positions."""

    folds = True
    shape = Shape(qk_norm=True, rope=False)


class QBiasAfter(Hazard):
    """Transformer-xl like: (q+u)k^T."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.u = param(HEADS, 1, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q + self.u, k, v).transpose(1, 2).flatten(2))


class RelPosK(Hazard):
    """Q . (k + rel[s]) and also q.rel as bias."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.rel = param(SEQ, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        k = k.repeat_interleave(2, 1)
        v = v.repeat_interleave(2, 1)
        sc = q @ k.transpose(2, 3) + q @ self.rel.t()
        return x + self.a2.o((sc.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PartialRope(Hazard):
    """Half of a head without positions."""

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        r = lambda t: torch.cat([rope(t[..., :4]), t[..., 4:]], -1)
        return self.head(self.norm(x + a.o(a.mixed(r(q), r(k), v).transpose(1, 2).flatten(2))))


class Softcapped(SecondAttention):
    """Scores behind a tanh, with a sliding window and queries scaled beforehand (Gemma 2)."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.matmul(rope(q) * 0.3, rope(k).transpose(2, 3)) / 5.0
        scores = torch.tanh(scores) * 5.0
        at = torch.arange(SEQ)
        mask = (at[None] > at[:, None]) | (at[None] <= at[:, None] - 3)
        return merged(scores.masked_fill(mask, float("-inf")).softmax(-1) @ v)


class Sinks(SecondAttention):
    """A learned logit per head joins every row of the scores and is dropped after the softmax (gpt-oss)."""

    folds = True

    def more(self) -> None:
        self.sinks = param(HEADS)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = rope(q) @ rope(k).transpose(2, 3)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, SEQ, -1)
        joined = torch.cat([scores, sinks], -1)
        joined = joined - joined.max(-1, keepdim=True).values
        return merged(joined.softmax(-1)[..., :-1] @ v)


class MultiQuery(Hazard):
    """One key and value head, everything biased and fused, learned positions."""

    folds = True
    shape = Shape(kv=1, qkv="fused", bias=True, rope=False, positions=True)


class PlainHeads(Hazard):
    """As many key heads as query heads, spelled out, norms on the heads."""

    folds = True
    shape = Shape(kv=4, spelled=True, qk_norm=True, norm="ln_nobias")


class Cosine(SecondAttention):
    """Queries and keys of unit length with a temperature per head (Swin 2)."""

    folds = True

    def more(self) -> None:
        self.heat = param(HEADS, 1, 1)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3)
        return merged((scores * self.heat.clamp(max=4.0).exp()).softmax(-1) @ v)


class Differential(SecondAttention):
    """The difference of two softmaxes over halves of the queries and keys, normed per head, over one value."""

    folds = True

    def more(self) -> None:
        self.lam, self.vn = nn.Parameter(torch.tensor(1.0)), RMSNorm(HEAD, weight=False)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        half = HEAD // 2
        one = (q[..., :half] @ k[..., :half].transpose(2, 3)).softmax(-1)
        two = (q[..., half:] @ k[..., half:].transpose(2, 3)).softmax(-1)
        return merged(self.vn((one - self.lam * two) @ v) * 0.8)


class AttentionByEinsum(SecondAttention):
    """Scores and result by einsum, no transposes."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        split = lambda linear: linear(h).view(*h.shape[:2], -1, HEAD)
        q, k, v = split(self.a2.q), split(self.a2.k), split(self.a2.v)
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


class AttentionByBmm(SecondAttention):
    """Batch and heads in one axis, scores by baddbmm onto a bias (Bloom)."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        q, k, v = q.reshape(-1, SEQ, HEAD), k.transpose(2, 3).reshape(-1, HEAD, SEQ), v.reshape(-1, SEQ, HEAD)
        bias = torch.arange(SEQ, dtype=h.dtype).expand(q.shape[0], 1, SEQ)
        y = torch.bmm(torch.baddbmm(bias, q, k, beta=0.5, alpha=0.3).softmax(-1), v)
        return merged(y.view(-1, HEADS, SEQ, HEAD))


class GroupedByView(SecondAttention):
    """Grouped queries as a five-axis product, no key is repeated."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        q = rope(q).unflatten(1, (KV, HEADS // KV))
        weights = (q @ rope(k)[:, :, None].transpose(-1, -2)).softmax(-1)
        return merged((weights @ v[:, :, None]).flatten(1, 2))


class RepeatedInTurn(SecondAttention):
    """Key heads are repeated in turn (0 1 0 1), not each by itself."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged(F.scaled_dot_product_attention(rope(q), rope(k).repeat(1, 2, 1, 1), torch.cat([v, v], 1)))

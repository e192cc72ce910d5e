"""Attention of other kinds: latent, linear, local, cross, learned, and as torch brings it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, SecondAttention, merged, param
from tests.support.decoders import (
    BATCH,
    HEAD,
    HEADS,
    HIDDEN,
    KV,
    SEQ,
    VOCAB,
    Attention,
    Block,
    RMSNorm,
    Shape,
    rope,
    tokens,
)


class LearnedKeys(SecondAttention):
    """Learned keys and values stand before the computed ones (null attention, prefix tuning)."""

    folds = True

    def more(self) -> None:
        self.keys, self.prefix = param(KV, 2, HEAD), param(KV, 2, HEAD)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        first = lambda t: t[None].expand(h.shape[0], -1, -1, -1)
        k, v = torch.cat([first(self.keys), k], 2), torch.cat([first(self.prefix), v], 2)
        return merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


class LearnedQueries(SecondAttention):
    """A few learned queries pool the tokens, and a second layer hands the result back (perceiver)."""

    def more(self) -> None:
        self.latents, self.a3 = param(3, HIDDEN), Attention(self.s)

    def mix(self, h: Tensor) -> Tensor:
        z = self.latents[None].expand(h.shape[0], -1, -1)
        q, _, _ = self.a2.project(z)
        _, k, v = self.a2.project(h)
        z = self.a2.o(merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        q, _, _ = self.a3.project(h)
        _, k, v = self.a3.project(z)
        return self.a3.o(merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))) @ self.a2.o.weight


class LinearAttention(SecondAttention):
    """Feature maps in place of the softmax, causal by a running sum."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = (k[..., :, None] * v[..., None, :]).cumsum(2)
        y = torch.einsum("bhsd,bhsde->bhse", q, state)
        return merged(y / (q * k.cumsum(2)).sum(-1, keepdim=True))


class Latent(SecondAttention):
    """Keys and values out of one normed low-rank latent, positions on channels that all heads share (MLA)."""

    folds = True

    def more(self) -> None:
        self.down_q, self.qn, self.up_q = nn.Linear(HIDDEN, 10), RMSNorm(10), nn.Linear(10, HEADS * (HEAD + 4))
        self.down, self.kn = nn.Linear(HIDDEN, 12 + 4), RMSNorm(12)
        self.up = nn.Linear(12, HEADS * 2 * HEAD, bias=False)

    def mix(self, h: Tensor) -> Tensor:
        q = self.up_q(self.qn(self.down_q(h))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q_plain, q_turned = q.split([HEAD, 4], -1)
        latent, k_turned = self.down(h).split([12, 4], -1)
        kv = self.up(self.kn(latent)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k_plain, v = kv.split([HEAD, HEAD], -1)
        k_turned = rope(k_turned[:, None]).expand(-1, HEADS, -1, -1)
        q, k = torch.cat([q_plain, rope(q_turned)], -1), torch.cat([k_plain, k_turned], -1)
        return merged(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))


class Absorbed(SecondAttention):
    """The same with the key and value projections absorbed: scores and results in the latent."""

    folds = True

    def more(self) -> None:
        self.down, self.kn = nn.Linear(HIDDEN, 12), RMSNorm(12)
        self.uk, self.uv = param(HEADS, HEAD, 12), param(HEADS, HEAD, 12)

    def mix(self, h: Tensor) -> Tensor:
        q, _, _ = self.a2.project(h)
        latent = self.kn(self.down(h))
        q = torch.einsum("bhsd,hdc->bhsc", q, self.uk)
        weights = (q @ latent[:, None].transpose(-1, -2)).softmax(-1)
        return merged(torch.einsum("bhsc,hdc->bhsd", weights @ latent[:, None], self.uv))


class TorchAttention(Hazard):
    """nn.MultiheadAttention with its packed projection."""

    folds = True

    def prepare(self) -> None:
        self.mha = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        return x + self.mha(h, h, h, need_weights=False)[0] + self.mha(h, h, h)[0]


class TorchLayer(Hazard):
    """nn.TransformerEncoderLayer, pre-norm, and nn.TransformerDecoderLayer, post-norm."""

    def prepare(self) -> None:
        options: dict[str, Any] = dict(dim_feedforward=40, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoderLayer(HIDDEN, 4, norm_first=True, **options)
        self.decoder = nn.TransformerDecoderLayer(HIDDEN, 4, **options)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.decoder(self.encoder(x), x)


class LocalChunks(SecondAttention):
    """Attention within windows: tokens padded, cut in chunks and put together."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = (F.pad(t, (0, 0, 0, 1)).unflatten(2, (2, 3)) for t in self.a2.project(h))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return merged(F.scaled_dot_product_attention(q, k, v).flatten(2, 3)[:, :, :SEQ])


class CrossAttention(Hazard):
    """Keys and values come from an encoder of another width, with a stream and norms of its own."""

    folds = True

    def prepare(self) -> None:
        other = Shape(hidden=16, ffn=20, norm="ln", bias=True, rope=False)
        self.encoder, self.table, self.done = Block(other), nn.Embedding(VOCAB, 16), nn.LayerNorm(16)
        self.a2, self.k2, self.v2 = Attention(self.s), nn.Linear(16, KV * HEAD), nn.Linear(16, KV * HEAD)

    def forward(self, ids: Tensor, source: Tensor) -> Any:
        e = self.done(self.encoder(self.table(source)))
        x = self.blocks[0](self.embedded(ids))
        q, _, _ = self.a2.project(self.norm(x))
        k, v = (f(e).unflatten(-1, (KV, HEAD)).transpose(1, 2) for f in (self.k2, self.v2))
        return self.finish(x + self.a2.o(merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))))

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), tokens(seq=7, seed=5)


class CrossToInput(Hazard):
    """The encoder's result is an input of the program, and an output behind a projection."""

    folds = True

    def prepare(self) -> None:
        self.a2, self.k2, self.v2 = Attention(self.s), nn.Linear(16, KV * HEAD), nn.Linear(16, KV * HEAD)
        self.project = nn.Linear(16, HIDDEN)

    def forward(self, ids: Tensor, encoded: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, _, _ = self.a2.project(self.norm(x))
        k, v = (f(encoded).unflatten(-1, (KV, HEAD)).transpose(1, 2) for f in (self.k2, self.v2))
        x = x + self.a2.o(merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        return self.finish(x), self.finish(self.project(encoded))

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), torch.randn(BATCH, 7, 16, dtype=torch.float64)

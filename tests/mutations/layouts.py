"""Fused and interleaved layouts of projections, biases everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, SecondAttention, merged, param
from tests.support.decoders import FFN, HEAD, HEADS, HIDDEN, KV, Shape, rope

GROUP = HEADS // KV


class Packed(SecondAttention):
    """One projection for queries, keys and values; :meth:`split` takes it apart."""

    shape = Shape(bias=True, norm="ln")

    def more(self) -> None:
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV) * HEAD)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, seq, all) -> q, k, v as (batch, heads, seq, head)."""
        raise NotImplementedError

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(h))
        return merged(self.a2.mixed(rope(q), rope(k), v))


class ValuesFirst(Packed):
    """v | q | k."""

    folds = True

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, q, k = (
            t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in y.split([KV * HEAD, HEADS * HEAD, KV * HEAD], -1)
        )
        return q, k, v


class GroupByGroup(Packed):
    """q q k v, then the next group."""

    folds = True

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = y.unflatten(-1, (KV, GROUP + 2, HEAD))
        q, k, v = y.split([GROUP, 1, 1], -2)
        return q.flatten(2, 3).transpose(1, 2), k.flatten(2, 3).transpose(1, 2), v.squeeze(-2).transpose(1, 2)


class HeadsLast(Packed):
    """Channels first, heads last: head h has channels h, h + H, …"""

    folds = True

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = y.unflatten(-1, (HEAD, HEADS + 2 * KV)).permute(0, 3, 1, 2).split([HEADS, KV, KV], 1)
        return q, k, v


class KeysValuesAlternate(Packed):
    """q, then k and v channel by channel in turn."""

    folds = True

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, kv = y[..., : HEADS * HEAD], y[..., HEADS * HEAD :]
        k, v = kv.unflatten(-1, (KV, HEAD, 2)).unbind(-1)
        return q.unflatten(-1, (HEADS, HEAD)).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class ThreeOnAnAxis(Packed):
    """(3, heads, head), taken apart by unbind after a permutation."""

    folds = True

    def more(self) -> None:
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).reshape(*h.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        return merged(F.scaled_dot_product_attention(q, k, v))


class KeysAsColumns(Packed):
    """Keys are made as columns, by a weight on the left."""

    def mix(self, h: Tensor) -> Tensor:
        q, _, v = self.a2.project(h)
        k = (self.a2.k.weight @ h.transpose(1, 2) + self.a2.k.bias[:, None]).unflatten(1, (KV, HEAD))
        weights = (q.unflatten(1, (KV, GROUP)) @ k[:, :, None]).softmax(-1)
        return merged((weights @ v[:, :, None]).flatten(1, 2))


class FourAxes(Hazard):
    """Weights with heads as axes of their own, by einsum, output projection too."""

    folds = True

    def prepare(self) -> None:
        self.q, self.k, self.v = param(HIDDEN, HEADS, HEAD), param(HIDDEN, HEADS, HEAD), param(HEADS, HEAD, HIDDEN)
        self.o, self.vb, self.ob = param(HEADS, HEAD, HIDDEN), param(HEADS, HEAD), param(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k = (torch.einsum("bsi,ihd->bhsd", h, w) for w in (self.q, self.k))
        v = torch.einsum("bsi,hdi->bhsd", h, self.v) + self.vb[:, None]
        y = (rope(q) @ rope(k).transpose(2, 3)).softmax(-1) @ v
        return x + torch.einsum("bhsd,hdo->bso", y, self.o) + self.ob


class EverythingFused(Hazard):
    """One projection in and one out for attention and MLP together (PaLM, ViT-22B)."""

    folds = True
    shape = Shape(norm="ln_nobias")

    def prepare(self) -> None:
        self.into = nn.Linear(HIDDEN, 3 * HEADS * HEAD + 2 * FFN)
        self.out = nn.Linear(HEADS * HEAD + FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        qkv, mlp = self.into(self.norm(x)).split([3 * HEADS * HEAD, 2 * FFN], -1)
        q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        y = merged(F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True))
        up, gate = mlp.chunk(2, -1)
        return x + self.out(torch.cat([y, F.silu(gate) * up], -1))


class GatesAlternate(Hazard):
    """Gate and up alternate channel by channel, down reads them in reverse order."""

    folds = True
    shape = Shape(bias=True)

    def prepare(self) -> None:
        self.gate_up, self.down = nn.Linear(HIDDEN, 2 * FFN), nn.Linear(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = self.gate_up(self.blocks[layer].norm2(x))
        return x + self.down((F.silu(y[..., 0::2]) * y[..., 1::2]).flip(-1))


class GatePadded(Hazard):
    """The inner width is padded, in the graph and in the weights."""

    folds = True

    def prepare(self) -> None:
        self.gate_up, self.down = nn.Linear(HIDDEN, 2 * 36), nn.Linear(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        gate, up = self.gate_up(self.blocks[layer].norm2(x)).chunk(2, -1)
        return x + self.down(F.pad(F.gelu(gate) * up, (0, FFN - 36)))


class InnerNorm(Hazard):
    """A norm with scale and bias inside the MLP, before the down projection."""

    folds = True
    shape = Shape(norm="ln", bias=True)

    def prepare(self) -> None:
        self.up, self.inner, self.down = nn.Linear(HIDDEN, FFN), nn.LayerNorm(FFN), nn.Linear(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.down(self.inner(F.gelu(self.up(self.blocks[layer].norm2(x)))))


class Squared(Hazard):
    """relu² without a gate, an MLP without an activation, a bilinear gate."""

    folds = True

    def prepare(self) -> None:
        self.a, self.b, self.c, self.d = (nn.Linear(n, m, bias=False) for n, m in [(HIDDEN, FFN), (FFN, HIDDEN)] * 2)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        x = x + self.b(F.relu(self.a(h)).square()) + self.d(self.c(h))
        return x + self.b(self.a(h) * self.c(h))


class FusedAcrossLayers(Hazard):
    """One projection computes the keys and values of both layers."""

    folds = True
    shape = Shape(layers=2)

    def prepare(self) -> None:
        self.kv = nn.Linear(HIDDEN, 2 * 2 * KV * HEAD)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedded(ids)
        kv = self.kv(self.norm(x)).unflatten(-1, (2, 2, KV, HEAD)).permute(2, 3, 0, 4, 1, 5)
        for i, b in enumerate(self.blocks):
            q, _, _ = b.attn.project(b.norm1(x))
            x = x + b.attn.o(merged(b.attn.mixed(rope(q), rope(kv[i, 0]), kv[i][1])))
            x = x + b.mlp(b.norm2(x))
        return self.finish(x)

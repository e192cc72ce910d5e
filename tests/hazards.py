"""Decoders in which tools that match by name or by shape go wrong: each a small twist of :class:`tests.decoders.Decoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spinpass.library  # noqa: F401  (registers torch.ops.spinpass)
from tests.decoders import BATCH, FFN, HEAD, HEADS, HIDDEN, KV, SEQ, VOCAB, Attention, Block, Decoder, RMSNorm, rope


def _p(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(*size))


class LinearMixer(Decoder):
    """W reads and writes the stream, no bias; LN with bias."""

    def __init__(self) -> None:
        super().__init__(norm="ln")

    def prepare(self) -> None:
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mn = nn.LayerNorm(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mix(self.mn(x))


class LinearMixerBias(Decoder):
    """The same with a bias."""

    def __init__(self) -> None:
        super().__init__(norm="ln")

    def prepare(self) -> None:
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=True)
        self.mn = nn.LayerNorm(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.mix(self.mn(x))


class AlphaShift(Decoder):
    """A norm's bias added with a factor."""

    def prepare(self) -> None:
        self.g = _p(HIDDEN)
        self.b = _p(HIDDEN)
        self.rn = RMSNorm(HIDDEN, weight=False)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.add(self.rn(x) * self.g, self.b, alpha=2.0))


class AlphaShift2(Decoder):
    """A norm's bias that the scaled value is added to with a factor."""

    def prepare(self) -> None:
        self.g = _p(HIDDEN)
        self.b = _p(HIDDEN)
        self.rn = RMSNorm(HIDDEN, weight=False)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.add(self.b, self.rn(x) * self.g, alpha=2.0))


class SubShift(Decoder):
    """A norm's bias with the opposite sign."""

    def prepare(self) -> None:
        self.g = _p(HIDDEN)
        self.b = _p(HIDDEN)
        self.rn = RMSNorm(HIDDEN, weight=False)

    def finish(self, x: Tensor) -> Any:
        return self.head(torch.sub(self.rn(x) * self.g, self.b))


class ExpandToken(Decoder):
    """Per token bias expanded over channels."""

    def prepare(self) -> None:
        self.tb = nn.Linear(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.tb(x).expand_as(x)


class ExpandScalar(Decoder):
    """One learned number added to all channels, expanded."""

    def prepare(self) -> None:
        self.c = nn.Parameter(torch.tensor(1.0))

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.c.expand(x.shape)


class ExpandTokenConst(Decoder):
    """One constant per position added to all channels."""

    def prepare(self) -> None:
        self.c = _p(SEQ, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.c.expand(SEQ, HIDDEN)


class BroadcastToken(Decoder):
    """One computed number per token added to all channels."""

    def prepare(self) -> None:
        self.tb = nn.Linear(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.tb(x)


class ViewDtype(Decoder):
    """The bits of the stream."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return (x.view(torch.int64) ^ 1).view(torch.float64) if layer == 0 else x


class MatmulLeft(Decoder):
    """A weight on the left of a matmul, behind a norm with bias."""

    def __init__(self) -> None:
        super().__init__(norm="ln")

    def prepare(self) -> None:
        self.W = _p(HIDDEN, HIDDEN)
        self.ln = nn.LayerNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        y = torch.matmul(self.W, self.ln(x).transpose(1, 2))
        return (self.head(self.norm(x)), y)


class AddmmAlpha(Decoder):
    """Addmm with factors behind a norm with bias."""

    def __init__(self) -> None:
        super().__init__(norm="ln")

    def prepare(self) -> None:
        self.W = _p(HIDDEN, VOCAB)
        self.b = _p(VOCAB)
        self.ln = nn.LayerNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return torch.addmm(self.b, self.ln(x).flatten(0, 1), self.W, beta=3.0, alpha=2.0)


class EinsumPos(Decoder):
    """A scale per position where positions are as many as channels."""

    def prepare(self) -> None:
        self.c = _p(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(torch.einsum("bsh,s->bhs", x[:, :1].expand(-1, HIDDEN, -1), self.c).transpose(1, 2)))


class BoolMask(Decoder):
    """Tokens gathered by a matrix of positions."""

    def finish(self, x: Tensor) -> Any:
        i = torch.tensor([[0, 1], [1, 0]])
        return self.head(self.norm(x[:, i]))


class IndexPair(Decoder):
    """Tokens gathered by pairs."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x[torch.tensor([0, 1]), torch.tensor([2, 1])]))


class TiedPlainLN(Decoder):
    """A tied table, norms without parameters."""

    def __init__(self) -> None:
        super().__init__(norm="ln_plain", tied=True)


class TiedLN(Decoder):
    """A tied table, LayerNorm."""

    def __init__(self) -> None:
        super().__init__(norm="ln", tied=True)


class ReturnsContext(Decoder):
    """Attention's result is an output."""

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        c = a.mixed(q, k, v)
        return (self.head(self.norm(x + a.o(c.transpose(1, 2).flatten(2)))), c)


class ReturnsQ(Decoder):
    """Queries, keys and values are outputs."""

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        c = a.mixed(q, k, v)
        return (self.head(self.norm(x + a.o(c.transpose(1, 2).flatten(2)))), q, k, v)


class Normalize(Decoder):
    """F.normalize as the norm."""

    def finish(self, x: Tensor) -> Any:
        return self.head(F.normalize(x, dim=-1))


class ValueHead(Decoder):
    """A second head on the raw stream."""

    def prepare(self) -> None:
        self.vh = nn.Linear(HIDDEN, 1)

    def finish(self, x: Tensor) -> Any:
        return (super().finish(x), self.vh(x))


class EarlyExit(Decoder):
    """A nonlinear head on the raw stream."""

    def prepare(self) -> None:
        self.e = nn.Linear(HIDDEN, VOCAB)

    def between(self, x: Tensor, layer: int) -> Tensor:
        if layer == 0:
            self.early = self.e(torch.tanh(x))
        return x

    def finish(self, x: Tensor) -> Any:
        return (super().finish(x), self.early)


class LayerScale(Decoder):
    """A scale per channel on a branch."""

    def prepare(self) -> None:
        self.ls = _p(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.ls * self.blocks[0].mlp(self.blocks[0].norm2(x))


class StreamScale(Decoder):
    """A scale per channel on the stream."""

    def prepare(self) -> None:
        self.ls = _p(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x * self.ls


class SharedNorm(Decoder):
    """One norm weight for all norms."""

    def prepare(self) -> None:
        for b in self.blocks:
            b.norm2.weight = b.norm1.weight
        self.norm.weight = self.blocks[0].norm1.weight


class Slice(Decoder):
    """Channels of the stream are an output."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x[..., :5])


class SliceInside(Decoder):
    """Channels of the stream go their own way."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + F.pad(x[..., :8], (0, HIDDEN - 8))


class OutputStream(Decoder):
    """The stream is an output."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x)


class Roll(Decoder):
    """Channels are rolled."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + x.roll(1, -1)


class MeanOut(Decoder):
    """The mean over channels is an output."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.mean(-1))


class MeanSub(Decoder):
    """The centred stream is an output of an RMSNorm model."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x - x.mean(-1, keepdim=True))


class MaxPool(Decoder):
    """A maximum over tokens."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.amax(1, keepdim=True)))


class GateByStream(Decoder):
    """The stream is gated channel by channel."""

    def prepare(self) -> None:
        self.g = nn.Linear(HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x * torch.sigmoid(self.g(x))


class Dup(Decoder):
    """The stream plus itself."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + x


class SelfDot(Decoder):
    """Gram matrix of tokens."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x @ x.transpose(1, 2))


class SelfOuter(Decoder):
    """Gram matrix of channels."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.transpose(1, 2) @ x)


class EmbNormed(Decoder):
    """A norm behind the embedding."""

    def prepare(self) -> None:
        self.en = nn.LayerNorm(HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.en(self.embed(ids))


class TwoEmb(Decoder):
    """Same table looked up twice."""

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + 0.5 * self.embed(ids.flip(1))


class EmbAsOutputTarget(Decoder):
    """The table is an output."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.embed.weight * 2)


class Router(Decoder):
    """A mixture of linear experts."""

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, 4)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        w = torch.softmax(self.r(h), -1)
        return x + sum((w[..., i : i + 1] * e(h) for i, e in enumerate(self.experts)))


class TokenScaleParam(Decoder):
    """Learned numbers as multipliers."""

    def prepare(self) -> None:
        self.a = nn.Parameter(torch.tensor(1.0))
        self.b = _p(1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x * self.a + self.b * self.blocks[layer].mlp(self.blocks[layer].norm2(x))


class ScalarAdd(Decoder):
    """One added to all channels."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + 1.0


class ConstVecAdd(Decoder):
    """A learned vector added."""

    def prepare(self) -> None:
        self.c = _p(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.c


class Negative(Decoder):
    """Signs."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return -x - self.blocks[layer].mlp(self.blocks[layer].norm2(x))


class Concat(Decoder):
    """Two normed streams side by side."""

    def prepare(self) -> None:
        self.w = nn.Linear(2 * HIDDEN, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        self.e = e
        return e

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.w(torch.cat([self.norm(x), self.norm(self.e)], -1))


class ConcatRaw(Decoder):
    """Two raw streams side by side."""

    def prepare(self) -> None:
        self.w = nn.Linear(2 * HIDDEN, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        self.e = e
        return e

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.w(torch.cat([x, self.e], -1))


class CosineSim(Decoder):
    """Cosine similarity."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1))


class Dist(Decoder):
    """Distances and norms."""

    def finish(self, x: Tensor) -> Any:
        return (
            self.head(self.norm(x)),
            (x[:, 1:] - x[:, :-1]).pow(2).sum(-1),
            torch.cdist(x, x),
            x.norm(dim=-1),
            x.norm(p=1, dim=-1),
            x.norm(),
        )


class InPlace(Decoder):
    """An in-place sum."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x.clone()
        x.add_(self.blocks[layer].mlp(self.blocks[layer].norm2(x)))
        return x


class InPlaceSlice(Decoder):
    """Channels written in place."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        x = x.clone()
        x[:, 0] += 1.0
        x[..., 3] = 0.5
        return x


class MaskTokens(Decoder):
    """Tokens set to zero."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.masked_fill((torch.arange(SEQ) > 2)[None, :, None], 0.0)))


class MaskTokens1(Decoder):
    """Tokens set to a number."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.masked_fill((torch.arange(SEQ) > 2)[None, :, None], 1.5)))


class Where(Decoder):
    """Tokens replaced by a learned vector."""

    def prepare(self) -> None:
        self.c = _p(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.where((torch.arange(SEQ) > 2)[None, :, None], x, self.c)


class WhereChannel(Decoder):
    """Channels replaced."""

    def prepare(self) -> None:
        self.c = _p(HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.where((torch.arange(HIDDEN) > 2)[None, None, :], x, self.c)


class Conv1dHead(Decoder):
    """A convolution over channels."""

    def prepare(self) -> None:
        self.cv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.cv(x.transpose(1, 2)).transpose(1, 2)


class Bilinear(Decoder):
    """A bilinear form."""

    def prepare(self) -> None:
        self.bl = nn.Bilinear(HIDDEN, HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.bl(x, x))


class SharedLayers(Decoder):
    """One layer applied three times."""

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.finish(x)


class SharedProj(Decoder):
    """One output projection for two layers, a head on the raw stream."""

    def __init__(self) -> None:
        super().__init__(layers=2)

    def prepare(self) -> None:
        self.blocks[1].attn.o.weight = self.blocks[0].attn.o.weight

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.head(x))


class SharedGateUp(Decoder):
    """One weight as gate and up."""

    def prepare(self) -> None:
        self.blocks[0].mlp.up.weight = self.blocks[0].mlp.gate.weight


class QKShared(Decoder):
    """One weight for keys and values."""

    def prepare(self) -> None:
        self.blocks[0].attn.k.weight = self.blocks[0].attn.v.weight


class NormTwice(Decoder):
    """A norm of a norm."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(self.norm(x)))


class NormScaleOut(Decoder):
    """The scaled norm is an output."""

    def finish(self, x: Tensor) -> Any:
        y = self.norm(x)
        return (self.head(y), y)


class Gather(Decoder):
    """Gather."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x.gather(1, torch.tensor([[[2]], [[1]]]).expand(2, 1, HIDDEN))))


class ArgmaxC(Decoder):
    """Argmax over channels."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.argmax(-1))


class TopkC(Decoder):
    """Top channels."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.topk(3, -1)[0])


class ShapeOnly(Decoder):
    """Values that take only the shape."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.ones_like(x), torch.full_like(x, 3.0), torch.zeros_like(x))


class GroupNormed(Decoder):
    """Groups of channels normed."""

    def prepare(self) -> None:
        self.gn = nn.GroupNorm(4, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        return self.head(self.gn(x.flatten(0, 1)))


class CastMid(Decoder):
    """A cast to and fro."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x.to(torch.float32).to(torch.float64)


class BF16Cache(Decoder):
    """A rounding cast."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x.to(torch.int32).to(torch.float64) + x


class UnsqueezeHeads(Decoder):
    """A reader that sees the stream as heads."""

    def prepare(self) -> None:
        self.hw = _p(4, 6, 10)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.einsum("bshd,hdo->bso", self.norm(x).unflatten(-1, (4, 6)), self.hw))


class PartHeads(Decoder):
    """A reader that contracts part of the stream."""

    def prepare(self) -> None:
        self.hw = _p(4, 6, 10)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.einsum("bshd,hdo->bsho", self.norm(x).unflatten(-1, (4, 6)), self.hw))


class WeightChunk(Decoder):
    """A weight cut into pieces."""

    def prepare(self) -> None:
        self.w = _p(2 * HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a, b = self.w.chunk(2, 0)
        return x + F.linear(self.blocks[layer].norm2(x), a + b)


class WeightExpr(Decoder):
    """Weight norm."""

    def prepare(self) -> None:
        self.w = _p(HIDDEN, FFN)
        self.gain = _p(HIDDEN, 1)

    def between(self, x: Tensor, layer: int) -> Tensor:
        w = self.gain * self.w / self.w.norm(dim=1, keepdim=True)
        return x + F.linear(F.relu(F.linear(self.blocks[layer].norm2(x), self.w.t())), w)


class LoRA(Decoder):
    """Low-rank weights, merged and not."""

    def prepare(self) -> None:
        self.A = _p(4, HIDDEN)
        self.B = _p(HIDDEN, 4)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        return x + F.linear(h, self.B @ self.A) + h @ self.A.t() @ self.B.t()


class Shift(Decoder):
    """Token shift state in a buffer, non-zero initial."""

    def prepare(self) -> None:
        self.register_buffer("last", torch.randn(BATCH, 1, HIDDEN, dtype=torch.float64))
        self.mixw = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def between(self, x: Tensor, layer: int) -> Tensor:
        prev = torch.cat([self.last, x[:, :-1]], 1)
        self.last.copy_(x[:, -1:])
        return x + self.mixw(self.norm(prev))


class BufferCache2(Decoder):
    """A cache in buffers."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.register_buffer("vc", torch.randn(BATCH, KV, 16, HEAD, dtype=torch.float64))
        self.register_buffer("kc", torch.randn(BATCH, KV, 16, HEAD, dtype=torch.float64))

    def finish(self, x: Tensor) -> Any:
        a = self.a2
        q, k, v = a.project(self.norm(x))
        i = torch.arange(SEQ) + 3
        self.kc.index_copy_(2, i, rope(k))
        self.vc.index_copy_(2, i, v)
        c = F.scaled_dot_product_attention(rope(q), self.kc, self.vc, enable_gqa=True)
        return self.head(self.norm(x + a.o(c.transpose(1, 2).flatten(2))))


class MutIndex(Decoder):
    """An index that the program changes."""

    def prepare(self) -> None:
        self.register_buffer("perm", torch.arange(HIDDEN))

    def between(self, x: Tensor, layer: int) -> Tensor:
        y = x[..., self.perm]
        self.perm.copy_(self.perm.roll(1))
        return x + y


class PermIndex(Decoder):
    """Channels permuted by a buffer."""

    def prepare(self) -> None:
        self.register_buffer("perm", torch.arange(HIDDEN).roll(5))

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.blocks[layer].mlp(self.norm(x)[..., self.perm])


class MixedDtype(Decoder):
    """Parts in other dtypes."""

    def prepare(self) -> None:
        self.vh = nn.Linear(HIDDEN, 3)
        self.vh2 = nn.Linear(HIDDEN, 3)

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), self.vh2(torch.tanh(x)).float(), torch.tanh(x.float()), x.half())


class EmbCast(Decoder):
    """A table cast to and fro."""

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids).float().double()


class PartialRope(Decoder):
    """Half of a head without positions."""

    def finish(self, x: Tensor) -> Any:
        a = self.blocks[0].attn
        q, k, v = a.project(self.norm(x))
        r = lambda t: torch.cat([rope(t[..., :4]), t[..., 4:]], -1)
        return self.head(self.norm(x + a.o(a.mixed(r(q), r(k), v).transpose(1, 2).flatten(2))))


class VNorm(Decoder):
    """Norm on v heads + gate on context."""

    def prepare(self) -> None:
        self.vn = RMSNorm(HEAD)
        self.g = nn.Linear(HIDDEN, HEADS)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, self.vn(v))
        c = c * torch.sigmoid(self.g(h)).transpose(1, 2)[..., None]
        return x + a.o(c.transpose(1, 2).flatten(2))


class VNormPlain(Decoder):
    """Values normed without a scale."""

    def prepare(self) -> None:
        self.vn = RMSNorm(HEAD, weight=False)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, self.vn(v))
        return x + a.o(c.transpose(1, 2).flatten(2))


class ContextNorm(Decoder):
    """Sub-LN before o over whole H*D."""

    def prepare(self) -> None:
        self.cn = RMSNorm(HEADS * HEAD)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, v).transpose(1, 2).flatten(2)
        return x + a.o(self.cn(c))


class ContextGateChannel(Decoder):
    """Attention's result gated channel by channel."""

    def prepare(self) -> None:
        self.g = nn.Linear(HIDDEN, HEADS * HEAD)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, v).transpose(1, 2).flatten(2)
        return x + a.o(c * torch.sigmoid(self.g(h)))


class VSharedWithK(Decoder):
    """K == v projection output."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, _ = a.project(h)
        c = a.mixed(q, k, k)
        return x + a.o(c.transpose(1, 2).flatten(2))


class VSharedWithKRope(Decoder):
    """Keys without positions as values."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, _ = a.project(h)
        c = a.mixed(rope(q), rope(k), k)
        return x + a.o(c.transpose(1, 2).flatten(2))


class CrossLayerV(Decoder):
    """Second attention reuses first's k,v."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.a3 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        x = x + self.a2.o(self.a2.mixed(rope(q), rope(k), v).transpose(1, 2).flatten(2))
        q, _, _ = self.a3.project(self.norm(x))
        return x + self.a3.o(self.a3.mixed(rope(q), rope(k), v).transpose(1, 2).flatten(2))


class MixKV(Decoder):
    """Value residual (v = lerp of two layers)."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.a3 = Attention(self.s)
        self.lam = nn.Parameter(torch.tensor(1.0))

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        x = x + self.a2.o(self.a2.mixed(rope(q), rope(k), v).transpose(1, 2).flatten(2))
        q, k, v2 = self.a3.project(self.norm(x))
        return x + self.a3.o(
            self.a3.mixed(rope(q), rope(k), self.lam * v2 + (1 - self.lam) * v).transpose(1, 2).flatten(2)
        )


class TalkingHeads(Decoder):
    """Heads of the scores mixed before the softmax."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = _p(HEADS, HEADS)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        w = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(2, 3), self.th).softmax(-1)
        return x + self.a2.o((w @ v).transpose(1, 2).flatten(2))


class HeadMixV(Decoder):
    """Mixes heads in context linearly."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = _p(HEADS, HEADS)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        c = torch.einsum("bhsd,hg->bgsd", self.a2.mixed(q, k, v), self.th)
        return x + self.a2.o(c.transpose(1, 2).flatten(2))


class HeadScaleV(Decoder):
    """A scale per head."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = _p(HEADS, 1, 1)
        self.ch = _p(HEADS, 1, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        c = self.a2.mixed(q, k, v) * self.th
        return x + self.a2.o(c.transpose(1, 2).flatten(2))


class HeadScaleVC(Decoder):
    """A scale per channel of attention's result."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = _p(HEADS, 1, 1)
        self.ch = _p(HEADS, 1, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        c = self.a2.mixed(q, k, v) * self.ch
        return x + self.a2.o(c.transpose(1, 2).flatten(2))


class HeadNormScaleQ(Decoder):
    """Per-channel scale on q only, no rope."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.qs = _p(HEAD)
        self.ks = _p(HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q * self.qs, k, v).transpose(1, 2).flatten(2))


class QKNormNoRope(Decoder):
    """Q and k normed, no positions."""

    def __init__(self) -> None:
        super().__init__(qk_norm=True, rope=False)


class QBiasAfter(Decoder):
    """Transformer-xl like: (q+u)k^T."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.u = _p(HEADS, 1, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q + self.u, k, v).transpose(1, 2).flatten(2))


class RelPosK(Decoder):
    """Q . (k + rel[s]) and also q.rel as bias."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.rel = _p(SEQ, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        k = k.repeat_interleave(2, 1)
        v = v.repeat_interleave(2, 1)
        sc = q @ k.transpose(2, 3) + q @ self.rel.t()
        return x + self.a2.o((sc.softmax(-1) @ v).transpose(1, 2).flatten(2))


class KVHeadMean(Decoder):
    """Values centred over tokens."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q, k, v - v.mean(2, keepdim=True)).transpose(1, 2).flatten(2))


class VRelu(Decoder):
    """Values through a nonlinearity."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q, k, F.relu(v)).transpose(1, 2).flatten(2))


class TwoStreams(Decoder):
    """Other stream of same width, mixes at the end by product."""

    def prepare(self) -> None:
        self.e2 = nn.Embedding(VOCAB, HIDDEN)
        self.b2 = Block(self.s)
        self.n2 = RMSNorm(HIDDEN)

    def finish(self, x: Tensor) -> Any:
        y = self.b2(self.e2.weight[:SEQ][None] + 0 * x)
        return self.head(self.norm(x) * torch.sigmoid(self.n2(y)))


class TwoStreams2(Decoder):
    """Two streams that never meet, a layer applied twice."""

    def prepare(self) -> None:
        self.e2 = nn.Embedding(VOCAB, HIDDEN)
        self.b2 = Block(self.s)
        self.n2 = RMSNorm(HIDDEN)
        self.h2 = nn.Linear(HIDDEN, 7)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        y = self.b2(self.b2(self.e2(ids)))
        x = self.blocks[0](x)
        return (self.head(self.norm(x)), self.h2(self.n2(y)))


class ConvMix(Decoder):
    """Depthwise causal conv in stream."""

    def prepare(self) -> None:
        self.cv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.cv(self.norm(x).transpose(1, 2)).transpose(1, 2)


class MoE(Decoder):
    """Batched expert weights, bmm and gather."""

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, 3)
        self.w1 = _p(3, HIDDEN, FFN)
        self.w2 = _p(3, FFN, HIDDEN)
        self.b2 = _p(3, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        w, i = torch.softmax(self.r(h), -1).topk(2, -1)
        hh = torch.einsum("td,edf->etf", h, self.w1)
        y = torch.bmm(F.relu(hh), self.w2) + self.b2[:, None]
        m = torch.zeros_like(self.r(h)).scatter(1, i, w)
        return x + (y * m.t()[..., None]).sum(0).view_as(x)


class MoEGather(Decoder):
    """Weights gathered per token."""

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, 3)
        self.w1 = _p(3, FFN, HIDDEN)
        self.w2 = _p(3, HIDDEN, FFN)
        self.b2 = _p(3, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        i = self.r(h).argmax(-1)
        y = torch.einsum("tf,tdf->td", F.relu(torch.einsum("td,tfd->tf", h, self.w1[i])), self.w2[i]) + self.b2[i]
        return x + y.view_as(x)


class Mamba(Decoder):
    """Cumsum."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(torch.cumsum(x, 1)))


class CumsumChannel(Decoder):
    """A running sum over channels."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), torch.cumsum(x, -1))


class HyperConn(Decoder):
    """Several copies of stream mixed."""

    def prepare(self) -> None:
        self.mx = _p(3, 3)
        self.al = _p(3)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.embed(ids)[:, :, None].expand(-1, -1, 3, -1)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedded(ids)
        b = self.blocks[0]
        y = torch.einsum("bsnd,n->bsd", x, self.al)
        y = b.mlp(b.norm2(y))
        x = torch.einsum("bsnd,nm->bsmd", x, self.mx) + y[:, :, None]
        return self.head(self.norm(x.sum(2)))


class EmbProj(Decoder):
    """Factorised embedding."""

    def prepare(self) -> None:
        self.e2 = nn.Embedding(VOCAB, 10)
        self.pr = nn.Linear(10, HIDDEN)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.pr(self.e2(ids))


class Hadamarded(Decoder):
    """A rotation that is already there."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.ops.spinpass.hadamard(x, 24, False)


class IfBranch(Decoder):
    """A condition."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))


class Checkpointish(Decoder):
    """A region without gradients."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y


class AutocastRegion(Decoder):
    """A region with autocast off."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.blocks[0].mlp(self.norm(x))
        return x + y


class Complex(Decoder):
    """Complex rope."""

    def finish(self, x: Tensor) -> Any:
        y = torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            * torch.polar(torch.ones(12, dtype=x.dtype), torch.arange(12, dtype=x.dtype))
        ).flatten(-2)
        return self.head(self.norm(y))


class StatsOut(Decoder):
    """A norm's statistics are outputs."""

    def finish(self, x: Tensor) -> Any:
        y, m, r = torch.native_layer_norm(x, [HIDDEN], None, None, 1e-05)
        return (self.head(self.norm(x)), self.head(y), m, r)


class SoftmaxC(Decoder):
    """Statistics over channels."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(self.norm(x)), x.softmax(-1), x.std(-1), x.var(-1), x.max(), x.sum())


class HeadBias(Decoder):
    """Two heads that share a bias."""

    def prepare(self) -> None:
        self.hb = nn.Linear(HIDDEN, VOCAB, bias=True)

    def __init__(self) -> None:
        super().__init__(norm="ln", bias=True)

    def finish(self, x: Tensor) -> Any:
        return (self.hb(self.norm(x)), F.linear(self.norm(x), self.embed.weight, self.hb.bias))


class SharedBias(Decoder):
    """One bias for two linears and a norm."""

    def __init__(self) -> None:
        super().__init__(norm="ln", bias=True)

    def prepare(self) -> None:
        self.blocks[0].attn.o.bias = self.blocks[0].mlp.down.bias
        self.blocks[0].norm1.bias = self.blocks[0].mlp.down.bias


class NormBiasIsStream(Decoder):
    """Norm weight also added to the stream."""

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(x + self.norm.weight))


class WeightBothWays(Decoder):
    """W used as W and W.T (tied autoencoder MLP)."""

    def prepare(self) -> None:
        self.w = _p(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + F.linear(F.relu(F.linear(self.norm(x), self.w)), self.w.t())


class SquareWeightBothWays(Decoder):
    """O weight square used on both sides."""

    def prepare(self) -> None:
        self.w = _p(HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + F.linear(F.relu(F.linear(self.norm(x), self.w)), self.w)


class SymmetricRead(Decoder):
    """A quadratic form of the stream."""

    def prepare(self) -> None:
        self.w = _p(HIDDEN, HIDDEN)

    def finish(self, x: Tensor) -> Any:
        h = self.norm(x)
        return (self.head(h), torch.einsum("bsd,de,bte->bst", h, self.w, h), h @ self.w @ h.transpose(1, 2))


class EmptySlice(Decoder):
    """No tokens at all are joined to the tokens."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return torch.cat([x, self.blocks[layer].mlp(x)[:, :0]], 1)


ALL: dict[str, type[Decoder]] = {c.__name__: c for c in Decoder.__subclasses__() if c.__module__ == __name__}

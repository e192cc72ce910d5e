"""What becomes of attention's values, and of its result."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, SecondAttention, merged, param
from tests.support.decoders import HEAD, HEADS, HIDDEN, KV, Attention, RMSNorm, rope


class QKShared(Hazard):
    """One weight for keys and values."""

    folds = True
    reason = "R2 at .*multiplies channel by channel"
    missing = "R2"

    def prepare(self) -> None:
        self.blocks[0].attn.k.weight = self.blocks[0].attn.v.weight


class VNorm(Hazard):
    """Norm on v heads + gate on context."""

    folds = True
    reason = "R2 at .*multiplies channel by channel"

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


class VNormPlain(Hazard):
    """Values normed without a scale."""

    folds = True

    def prepare(self) -> None:
        self.vn = RMSNorm(HEAD, weight=False)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, self.vn(v))
        return x + a.o(c.transpose(1, 2).flatten(2))


class VSharedWithK(Hazard):
    """K == v projection output."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, _ = a.project(h)
        c = a.mixed(q, k, k)
        return x + a.o(c.transpose(1, 2).flatten(2))


class VSharedWithKRope(Hazard):
    """Keys without positions as values."""

    folds = True
    reason = "R2 at .*multiplies channel by channel"

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, _ = a.project(h)
        c = a.mixed(rope(q), rope(k), k)
        return x + a.o(c.transpose(1, 2).flatten(2))


class CrossLayerV(Hazard):
    """Second attention reuses first's k,v."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.a3 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        x = x + self.a2.o(self.a2.mixed(rope(q), rope(k), v).transpose(1, 2).flatten(2))
        q, _, _ = self.a3.project(self.norm(x))
        return x + self.a3.o(self.a3.mixed(rope(q), rope(k), v).transpose(1, 2).flatten(2))


class MixKV(Hazard):
    """Value residual (v = lerp of two layers)."""

    folds = True

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


class KVHeadMean(Hazard):
    """Values centred over tokens."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q, k, v - v.mean(2, keepdim=True)).transpose(1, 2).flatten(2))


class VRelu(Hazard):
    """Values through a nonlinearity."""

    folds = True
    reason = "R2 at .*aten::relu does not"

    def prepare(self) -> None:
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        return x + self.a2.o(self.a2.mixed(q, k, F.relu(v)).transpose(1, 2).flatten(2))


class ValueBiasPerHead(SecondAttention):
    """A bias per head on values and result, a head that is switched off."""

    folds = True

    def more(self) -> None:
        self.bias, self.after = param(KV, 1, HEAD), param(HEADS, 1, HEAD)
        self.register_buffer("on", torch.tensor([1.0, 0.0, 1.0, 1.0]).view(4, 1, 1))

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged((self.a2.mixed(q, k, v + self.bias) + self.after) * self.on)


class ValuesShifted(SecondAttention):
    """Values mixed with those of the token before."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        before = torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, :-1]], 2)
        return merged(self.a2.mixed(q, k, 0.7 * v + 0.3 * before))


class ValuesConvolved(SecondAttention):
    """A depthwise convolution over the tokens of values."""

    folds = True
    reason = "R2 at .*a convolution of groups of channels"

    def more(self) -> None:
        self.conv = nn.Conv1d(KV * HEAD, KV * HEAD, 3, padding=1, groups=KV * HEAD)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        v = self.conv(v.transpose(2, 3).flatten(1, 2)).unflatten(1, (KV, HEAD)).transpose(2, 3)
        return merged(self.a2.mixed(q, k, v))


class StreamAsValue(SecondAttention):
    """The normed stream itself is the value of one head as wide as the stream."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, _ = self.a2.project(h)
        weights = (q @ k.repeat_interleave(2, 1).transpose(2, 3)).softmax(-1)
        return x + (weights.mean(1) @ h) @ self.a2.o.weight[:, :HIDDEN]


class ValuesReadByMLP(SecondAttention):
    """Values are read by a second linear, and by a norm."""

    folds = True

    def more(self) -> None:
        self.other, self.back = nn.Linear(KV * HEAD, 6), nn.Linear(6, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = self.a2.project(self.norm(x))
        y = self.a2.o(merged(self.a2.mixed(q, k, v)))
        return x + y + self.back(F.relu(self.other(merged(v)))) * v.norm(dim=-1).mean((1, 2))[:, None, None]

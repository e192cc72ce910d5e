"""What becomes of attention's result before and behind its output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.mutations.hazard import Hazard, SecondAttention, merged, param
from tests.support.decoders import HEAD, HEADS, HIDDEN, Attention, RMSNorm, rope


class ContextNorm(Hazard):
    """Sub-LN before o over whole H*D."""

    folds = True

    def prepare(self) -> None:
        self.cn = RMSNorm(HEADS * HEAD)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, v).transpose(1, 2).flatten(2)
        return x + a.o(self.cn(c))


class ContextGateChannel(Hazard):
    """Attention's result gated channel by channel."""

    folds = True
    reason = "R2 at .*multiplies channel by channel"

    def prepare(self) -> None:
        self.g = nn.Linear(HIDDEN, HEADS * HEAD)
        self.a2 = Attention(self.s)

    def between(self, x: Tensor, layer: int) -> Tensor:
        a = self.a2
        h = self.norm(x)
        q, k, v = a.project(h)
        c = a.mixed(q, k, v).transpose(1, 2).flatten(2)
        return x + a.o(c * torch.sigmoid(self.g(h)))


class HeadMixV(Hazard):
    """Mixes heads in context linearly."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = param(HEADS, HEADS)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        c = torch.einsum("bhsd,hg->bgsd", self.a2.mixed(q, k, v), self.th)
        return x + self.a2.o(c.transpose(1, 2).flatten(2))


class HeadScaleV(Hazard):
    """A scale per head."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = param(HEADS, 1, 1)
        self.ch = param(HEADS, 1, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        c = self.a2.mixed(q, k, v) * self.th
        return x + self.a2.o(c.transpose(1, 2).flatten(2))


class HeadScaleVC(Hazard):
    """A scale per channel of attention's result."""

    folds = True
    reason = "R2 at .*multiplies channel by channel"

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.th = param(HEADS, 1, 1)
        self.ch = param(HEADS, 1, HEAD)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        q, k, v = self.a2.project(h)
        c = self.a2.mixed(q, k, v) * self.ch
        return x + self.a2.o(c.transpose(1, 2).flatten(2))


class ResultGatedByHead(SecondAttention):
    """Attention's result gated by a number per head and token, behind a norm without a scale."""

    folds = True

    def more(self) -> None:
        self.gate, self.rn = nn.Linear(HIDDEN, HEADS), RMSNorm(HEAD, weight=False)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        gate = torch.sigmoid(self.gate(h)).transpose(1, 2)[..., None]
        return merged(self.rn(self.a2.mixed(rope(q), rope(k), v)) * gate)


class ResultReadTwice(SecondAttention):
    """Attention's result goes through two output projections, one of them for some heads only."""

    folds = True

    def more(self) -> None:
        self.some = nn.Linear(2 * HEAD, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = self.a2.project(self.norm(x))
        c = self.a2.mixed(q, k, v)
        return x + self.a2.o(merged(c)) + self.some(merged(c[:, 1:3]))


class ResultPlusInput(SecondAttention):
    """Values are added to attention's result before the output projection."""

    folds = True

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        return merged(self.a2.mixed(q, k, v) + v.repeat_interleave(2, 1))

"""Routers, and experts that are none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, SecondAttention, param
from tests.support.decoders import FFN, HEADS, HIDDEN, MLP, RMSNorm, rope


class Router(Hazard):
    """A mixture of linear experts."""

    folds = True

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, 4)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        w = torch.softmax(self.r(h), -1)
        return x + sum((w[..., i : i + 1] * e(h) for i, e in enumerate(self.experts)))


class MoE(Hazard):
    """Batched expert weights, bmm and gather."""

    folds = True

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, 3)
        self.w1 = param(3, HIDDEN, FFN)
        self.w2 = param(3, FFN, HIDDEN)
        self.b2 = param(3, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        w, i = torch.softmax(self.r(h), -1).topk(2, -1)
        hh = torch.einsum("td,edf->etf", h, self.w1)
        y = torch.bmm(F.relu(hh), self.w2) + self.b2[:, None]
        m = torch.zeros_like(self.r(h)).scatter(1, i, w)
        return x + (y * m.t()[..., None]).sum(0).view_as(x)


class MoEGather(Hazard):
    """Weights gathered per token."""

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, 3)
        self.w1 = param(3, FFN, HIDDEN)
        self.w2 = param(3, HIDDEN, FFN)
        self.b2 = param(3, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        i = self.r(h).argmax(-1)
        y = torch.einsum("tf,tdf->td", F.relu(torch.einsum("td,tfd->tf", h, self.w1[i])), self.w2[i]) + self.b2[i]
        return x + y.view_as(x)


class RouterOnTheStream(Hazard):
    """The router reads the raw stream, with a correction that only chooses (DeepSeek); the experts read the norm."""

    folds = True

    def prepare(self) -> None:
        self.r, self.correction, self.experts = (
            nn.Linear(HIDDEN, 3, bias=False),
            param(3),
            nn.ModuleList(MLP(self.s) for _ in range(3)),
        )

    def between(self, x: Tensor, layer: int) -> Tensor:
        score = torch.sigmoid(self.r(x))
        keep = torch.zeros_like(score).scatter(-1, (score + self.correction).topk(2, -1).indices, 1.0)
        h = self.blocks[layer].norm2(x)
        return x + 2.5 * sum((score * keep)[..., i, None] * e(h) for i, e in enumerate(self.experts))


class RouterNormed(Hazard):
    """The router has a scaled norm of its own and a learned scale; a dense MLP stands beside the experts (Gemma 4)."""

    def prepare(self) -> None:
        self.r, self.scale, self.rn = nn.Linear(HIDDEN, 3, bias=False), param(HIDDEN), RMSNorm(HIDDEN, weight=False)
        self.experts, self.per_expert = nn.ModuleList(MLP(self.s) for _ in range(3)), param(3)

    def between(self, x: Tensor, layer: int) -> Tensor:
        weights = torch.softmax(self.r(self.rn(x) * self.scale * HIDDEN**-0.5), -1) * self.per_expert
        h = self.blocks[layer].norm2(x)
        y = sum(weights[..., i, None] * e(h) for i, e in enumerate(self.experts))
        return x + self.norm(y) + self.blocks[layer].mlp(h)


class ManyTinyExperts(Hazard):
    """Experts of one neuron are looked up in two tables by product keys (PEER)."""

    def prepare(self) -> None:
        self.query, self.keys = nn.Linear(HIDDEN, 12), param(2, 4, 6)
        self.into, self.back = nn.Embedding(16, HIDDEN), nn.Embedding(16, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        a, b = torch.einsum("bshd,hkd->hbsk", self.query(h).unflatten(-1, (2, 6)), self.keys).unbind(0)
        scores, ids = (a[..., :, None] + b[..., None, :]).flatten(-2).topk(3, -1)
        inner = F.gelu(torch.einsum("bsd,bskd->bsk", h, self.into(ids))) * scores.softmax(-1)
        return x + torch.einsum("bsk,bskd->bsd", inner, self.back(ids))


class HeadsAsExperts(SecondAttention):
    """A router weighs attention's heads per token."""

    folds = True

    def more(self) -> None:
        self.r = nn.Linear(HIDDEN, HEADS)

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        weights = self.r(h).softmax(-1)
        keep = torch.zeros_like(weights).scatter(-1, weights.topk(2, -1).indices, 1.0)
        return (self.a2.mixed(rope(q), rope(k), v).transpose(1, 2) * (weights * keep)[..., None]).flatten(2)

"""Mixtures of experts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, param
from tests.support.decoders import FFN, HIDDEN, MLP, Shape


class Experts(Hazard):
    """A router and a second branch, put together by :meth:`experts`."""

    shape = Shape(bias=True)
    count: ClassVar[int] = 3

    def prepare(self) -> None:
        self.r = nn.Linear(HIDDEN, self.count)
        self.more()

    def more(self) -> None:
        """The experts' weights."""

    def chosen(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, hidden) -> two normalised weights and expert ids per token."""
        weights, ids = torch.softmax(self.r(h), -1).topk(2, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def spread(self, h: Tensor) -> Tensor:
        """The weights as (tokens, experts), zero where an expert is not chosen."""
        weights, ids = self.chosen(h)
        return torch.zeros(h.shape[0], self.count, dtype=h.dtype).scatter(1, ids, weights)

    def experts(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.experts(self.norm(x).flatten(0, 1)).view_as(x)


class BmmInOut(Experts):
    """All experts on all tokens by bmm, weights (E, in, out), 2-D biases, gate and up interleaved (gpt-oss)."""

    folds = True

    def more(self) -> None:
        self.gate_up, self.down = param(3, HIDDEN, 2 * FFN), param(3, FFN, HIDDEN)
        self.gate_up_bias, self.down_bias = param(3, 2 * FFN), param(3, HIDDEN)

    def experts(self, h: Tensor) -> Tensor:
        all_tokens = h.repeat(3, 1).view(3, -1, HIDDEN)
        y = torch.bmm(all_tokens, self.gate_up) + self.gate_up_bias[:, None, :]
        gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
        y = torch.bmm((up + 1) * gate * torch.sigmoid(1.7 * gate), self.down) + self.down_bias[:, None, :]
        return (y * self.spread(h).t()[..., None]).sum(0)


class BmmOutIn(Experts):
    """The same with weights (E, out, in), transposed at run time, gate and up one after the other."""

    folds = True

    def more(self) -> None:
        self.gate_up, self.down = param(3, 2 * FFN, HIDDEN), param(3, HIDDEN, FFN)

    def experts(self, h: Tensor) -> Tensor:
        gate, up = torch.bmm(h[None].expand(3, -1, -1), self.gate_up.transpose(1, 2)).chunk(2, -1)
        y = torch.matmul(F.silu(gate) * up, self.down.mT)
        return torch.einsum("etd,te->td", y, self.spread(h))


class BaddbmmExperts(Experts):
    """The same with biases in baddbmm."""

    folds = True

    def more(self) -> None:
        self.up, self.down, self.b1, self.b2 = (
            param(3, HIDDEN, FFN),
            param(3, FFN, HIDDEN),
            param(3, FFN),
            param(3, HIDDEN),
        )

    def experts(self, h: Tensor) -> Tensor:
        y = torch.baddbmm(self.b1[:, None], h[None].expand(3, -1, -1), self.up)
        y = torch.baddbmm(self.b2[:, None], F.gelu(y), self.down)
        return torch.einsum("etd,te->td", y, self.spread(h))


class IndexedWeights(Experts):
    """The weights and biases of each token's experts are gathered, then applied by bmm and by einsum."""

    def more(self) -> None:
        self.up, self.down, self.b1, self.b2 = (
            param(3, FFN, HIDDEN),
            param(3, HIDDEN, FFN),
            param(3, FFN),
            param(3, HIDDEN),
        )

    def experts(self, h: Tensor) -> Tensor:
        weights, ids = self.chosen(h)
        y = torch.einsum("td,tkfd->tkf", h, self.up[ids]) + self.b1[ids]
        y = (self.down[ids] @ F.relu(y)[..., None]).squeeze(-1) + self.b2[ids]
        return (y * weights[..., None]).sum(1)


class IndexedByOneExpert(Experts):
    """The same for the best expert alone, by index_select and bmm."""

    def more(self) -> None:
        self.up, self.down, self.b2 = param(3, HIDDEN, FFN), param(3, FFN, HIDDEN), nn.Embedding(3, HIDDEN)

    def experts(self, h: Tensor) -> Tensor:
        ids = self.r(h).argmax(-1)
        y = torch.bmm(h[:, None], self.up.index_select(0, ids))
        return torch.bmm(F.silu(y), self.down[ids])[:, 0] + self.b2(ids)


class SelectedExperts(Experts):
    """Each expert's weight is selected, applied to all tokens and masked."""

    def more(self) -> None:
        self.up, self.down, self.b2 = param(3, FFN, HIDDEN), param(3, HIDDEN, FFN), param(3, HIDDEN)

    def experts(self, h: Tensor) -> Tensor:
        spread, out = self.spread(h), torch.zeros_like(h)
        for e in range(3):
            y = F.linear(F.gelu(F.linear(h, self.up[e])), self.down[e], self.b2[e])
            out = out + torch.where(spread[:, e, None] > 0, y * spread[:, e, None], 0.0)
        return out


class ListedExperts(Experts):
    """Experts in a module list that share an output bias, with a shared expert behind a gate of its own (Qwen MoE)."""

    folds = True

    def more(self) -> None:
        self.each, self.shared = nn.ModuleList(MLP(self.s) for _ in range(3)), MLP(self.s)
        self.shared_gate = nn.Linear(HIDDEN, 1, bias=False)
        for e in self.each:
            e.down.bias = self.each[0].down.bias

    def experts(self, h: Tensor) -> Tensor:
        spread = self.spread(h)
        y = sum(spread[:, i, None] * e(h) for i, e in enumerate(self.each))
        return y + torch.sigmoid(self.shared_gate(h)) * self.shared(h)


class StackedList(Experts):
    """The weights of a module list are stacked at run time."""

    folds = True

    def more(self) -> None:
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, FFN) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(FFN, HIDDEN, bias=False) for _ in range(3))

    def experts(self, h: Tensor) -> Tensor:
        up, bias = torch.stack([m.weight for m in self.ups]), torch.stack([m.bias for m in self.ups])
        y = F.silu(torch.einsum("td,efd->etf", h, up) + bias[:, None])
        return torch.einsum("etf,edf,te->td", y, torch.stack([m.weight for m in self.downs]), self.spread(h))


class Dispatched(Experts):
    """Tokens are sent to places by a one-hot product, and collected by another (Switch)."""

    def more(self) -> None:
        self.up, self.down = param(3, HIDDEN, FFN), param(3, FFN, HIDDEN)

    def experts(self, h: Tensor) -> Tensor:
        spread = self.spread(h)
        mask = (spread > 0).to(h.dtype)
        place = F.one_hot((mask.cumsum(0) * mask).long(), h.shape[0] + 1)[..., 1:].to(h.dtype) * mask[..., None]
        sent = torch.einsum("tec,td->ecd", place, h)
        y = torch.bmm(F.gelu(torch.bmm(sent, self.up)), self.down)
        return torch.einsum("ecd,tec->td", y, place * spread[..., None])


class ExpertsChoose(Experts):
    """Every expert takes its best tokens; results are added where they came from."""

    def more(self) -> None:
        self.up, self.down = param(3, HIDDEN, FFN), param(3, FFN, HIDDEN)

    def experts(self, h: Tensor) -> Tensor:
        weights, ids = torch.softmax(self.r(h), -1).t().topk(4, 1)
        y = torch.bmm(F.gelu(torch.bmm(h[ids], self.up)), self.down) * weights[..., None]
        return torch.zeros_like(h).index_add(0, ids.flatten(), y.flatten(0, 1))


class SoftSlots(Experts):
    """Every expert reads weighted means of the tokens (Soft MoE)."""

    def more(self) -> None:
        self.up, self.down = param(3, HIDDEN, FFN), param(3, FFN, HIDDEN)

    def experts(self, h: Tensor) -> Tensor:
        logits = self.r(h)
        slots = (logits.softmax(0).t() @ h)[:, None]
        y = torch.bmm(F.gelu(torch.bmm(slots, self.up)), self.down)[:, 0]
        return logits.softmax(-1) @ y

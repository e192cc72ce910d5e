"""Recurrences and convolutions over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, SecondAttention, param
from tests.support.decoders import BATCH, FFN, HEAD, HEADS, HIDDEN, SEQ, RMSNorm


class ConvMix(Hazard):
    """Depthwise causal conv in stream."""

    reason = "a convolution of groups of channels"

    def prepare(self) -> None:
        self.cv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.cv(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Mamba(Hazard):
    """Cumsum."""

    folds = True

    def finish(self, x: Tensor) -> Any:
        return self.head(self.norm(torch.cumsum(x, 1)))


class TokenShift(Hazard):
    """Every reader mixes the token with the one before, channel by channel (RWKV)."""

    reason = "channel by channel"

    def prepare(self) -> None:
        self.mu, self.up, self.down = param(HIDDEN), nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.norm(x)
        before = F.pad(h, (0, 0, 1, 0))[:, :-1]
        return x + self.down(F.relu(self.up(h + (before - h) * self.mu)).square())


class GatedDelta(SecondAttention):
    """A recurrent state of keys and values with a decay, unrolled (gated delta rule), normed and gated per head."""

    folds = True

    def more(self) -> None:
        self.decay, self.beta, self.on, self.gate = (
            nn.Linear(HIDDEN, HEADS),
            nn.Linear(HIDDEN, HEADS),
            RMSNorm(HEAD),
            nn.Linear(HIDDEN, HEADS * HEAD),
        )

    def mix(self, h: Tensor) -> Tensor:
        q, k, v = self.a2.project(h)
        q, k = F.normalize(q, dim=-1), F.normalize(k.repeat_interleave(2, 1), dim=-1)
        v, decay, beta = v.repeat_interleave(2, 1), torch.sigmoid(self.decay(h)), torch.sigmoid(self.beta(h))
        state, out = torch.zeros(BATCH, HEADS, HEAD, HEAD, dtype=h.dtype), []
        for t in range(3):
            kt, vt = k[:, :, t, :, None], v[:, :, t, None, :]
            state = state * decay[:, t, :, None, None]
            state = state + kt @ (beta[:, t, :, None, None] * (vt - kt.transpose(-1, -2) @ state))
            out.append((q[:, :, t, None] @ state)[:, :, 0])
        y = torch.stack([*out, out[-1], out[-1]], 1)
        return (self.on(y) * F.silu(self.gate(h)).unflatten(-1, (HEADS, HEAD))).flatten(2)


class StateSpace(Hazard):
    """A selective scan by cumsum in log space with projections, a depthwise causal convolution and a gate (Mamba 2)."""

    folds = True

    def prepare(self) -> None:
        self.into, self.out = nn.Linear(HIDDEN, 2 * FFN + 2 * 3 + 4, bias=False), nn.Linear(FFN, HIDDEN, bias=False)
        self.conv, self.a, self.d, self.gn = (
            nn.Conv1d(FFN, FFN, 3, padding=2, groups=FFN),
            param(4),
            param(4),
            RMSNorm(FFN),
        )

    def between(self, x: Tensor, layer: int) -> Tensor:
        z, u, b, c, dt = self.into(self.norm(x)).split([FFN, FFN, 3, 3, 4], -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :SEQ].transpose(1, 2)).unflatten(-1, (4, 10))
        log = (-F.softplus(dt) * self.a.abs()).cumsum(1)
        scores = torch.einsum("btn,bsn->bts", c, b)[..., None] * (log[:, :, None] - log[:, None]).exp()
        scores = scores * torch.ones(SEQ, SEQ, dtype=x.dtype).tril()[..., None]
        y = torch.einsum("btsh,bshd->bthd", scores, u) + self.d[:, None] * u
        return x + self.out(self.gn(y.flatten(2) * F.silu(z)))


class ShortConvolution(Hazard):
    """Gated short convolutions on the normed stream (LFM 2, Canon): depthwise, so that channels keep their places."""

    reason = "a convolution of groups of channels"

    def prepare(self) -> None:
        self.weight, self.into, self.out = param(HIDDEN, 1, 3), nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        h = self.blocks[layer].norm2(x)
        x = x + F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), self.weight, groups=HIDDEN).transpose(1, 2)
        b, c, u = self.into(h).chunk(3, -1)
        return x + self.out(c * F.conv1d(F.pad((b * u).mT, (2, 0)), self.weight, groups=HIDDEN).mT)


class MinimalRecurrence(Hazard):
    """A gated recurrence over the tokens, channel by channel, written as a loop (minGRU)."""

    folds = True

    def prepare(self) -> None:
        self.z, self.h, self.out = nn.Linear(HIDDEN, FFN), nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def between(self, x: Tensor, layer: int) -> Tensor:
        n = self.blocks[layer].norm2(x)
        z, h = torch.sigmoid(self.z(n)), self.h(n)
        state, seen = torch.zeros(BATCH, FFN, dtype=x.dtype), []
        for t in range(SEQ):
            state = (1 - z[:, t]) * state + z[:, t] * h[:, t]
            seen.append(state)
        return x + self.out(torch.stack(seen, 1))


class TorchRecurrence(Hazard):
    """nn.GRU between two layers of a decoder."""

    def prepare(self) -> None:
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x + self.gru(self.norm(x))[0]


class ExponentialMean(Hazard):
    """The stream is averaged over past tokens with a constant decay: no rotation of channels notices."""

    folds = True

    def between(self, x: Tensor, layer: int) -> Tensor:
        mean = x[:, 0]
        for t in range(1, 3):
            mean = 0.7 * mean + 0.3 * x[:, t]
        return x + self.blocks[layer].mlp(self.blocks[layer].norm2(x + mean[:, None]))

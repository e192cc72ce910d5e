"""State in buffers that the program updates, and state that is no KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.mutations.caches import PAST, PLACES
from tests.mutations.hazard import Hazard, merged
from tests.support.decoders import BATCH, HEAD, HIDDEN, KV, SEQ, Attention, rope, tokens


class Shift(Hazard):
    """Token shift state in a buffer, non-zero initial."""

    def prepare(self) -> None:
        self.register_buffer("last", torch.randn(BATCH, 1, HIDDEN, dtype=torch.float64))
        self.mixw = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def between(self, x: Tensor, layer: int) -> Tensor:
        prev = torch.cat([self.last, x[:, :-1]], 1)
        self.last.copy_(x[:, -1:])
        return x + self.mixw(self.norm(prev))


class BufferCache2(Hazard):
    """A cache in buffers."""

    folds = True

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


class BufferRolled(Hazard):
    """Caches in buffers, rolled and written in place; two calls."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(BATCH, KV, PLACES, HEAD, dtype=torch.float64))

    def finish(self, x: Tensor) -> Any:
        q, k, v = self.a2.project(self.norm(x))
        for cache, new in ((self.keys, rope(k)), (self.values, v)):
            cache.copy_(cache.roll(-SEQ, 2))
            cache[:, :, -SEQ:] = new
        y = F.scaled_dot_product_attention(rope(q), self.keys, self.values, enable_gqa=True)
        return super().finish(x + self.a2.o(merged(y)))


class BufferJoined(Hazard):
    """Caches in buffers that are replaced by their last places and the new tokens."""

    folds = True

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(BATCH, KV, PLACES, HEAD, dtype=torch.float64))

    def finish(self, x: Tensor) -> Any:
        q, k, v = self.a2.project(self.norm(x))
        self.keys.copy_(torch.cat([self.keys, rope(k)], 2)[:, :, -PLACES:])
        self.values.copy_(torch.cat([self.values, v], 2)[:, :, -PLACES:])
        y = F.scaled_dot_product_attention(rope(q), self.keys, self.values, enable_gqa=True)
        return super().finish(x + self.a2.o(merged(y)))


class HiddenStateCache(Hazard):
    """The stream of the last call comes in, and this call's goes out."""

    reason = "a program (in|out)put"

    def forward(self, ids: Tensor, past: Tensor) -> Any:
        x = torch.cat([past, self.embedded(ids)], 1)
        x = self.blocks[0](x)
        return self.finish(x[:, PAST:]), x[:, -PAST:]

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        return tokens(), torch.randn(
            BATCH, PAST, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
        )

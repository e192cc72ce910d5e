"""KV caches that the caller passes in and gets back, or has written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.mutations.hazard import Hazard, merged
from tests.support.decoders import BATCH, HEAD, KV, SEQ, Attention, rope, tokens

PAST, PLACES = 3, 12


class Cached(Hazard):
    """A second attention layer that decodes: past keys and values come in, new ones go out as :meth:`joined` says."""

    def prepare(self) -> None:
        self.a2 = Attention(self.s)
        self.more()

    def more(self) -> None:
        """Further parameters."""

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Past and new keys and values -> what is returned, and what attention reads."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.a2.project(self.norm(x))
        cache, k, v = self.joined(keys, values, rope(k), v)
        return self.finish(x + self.a2.o(self.attend(rope(q), k, v))), cache

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(7)
        return tokens(), *(torch.randn(BATCH, KV, PAST, HEAD, generator=draw, dtype=torch.float64) for _ in range(2))


class Static(Cached):
    """Caches with room for more tokens than are there."""

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(7)
        return tokens(), *(torch.randn(BATCH, KV, PLACES, HEAD, generator=draw, dtype=torch.float64) for _ in range(2))


class CatCache(Cached):
    """Joined along the tokens."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return (k, v), k, v


class StaticCache(Static):
    """Written at places by index_copy, returned."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        at = torch.arange(PAST, PAST + SEQ)
        k, v = keys.index_copy(2, at, k), values.index_copy(2, at, v)
        return (k, v), k, v


class StaticCacheInPlace(Static):
    """Written in place by index_put and by slice assignment; nothing is returned."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        at = torch.arange(PAST, PAST + SEQ)
        keys[:, :, at] = k
        values[:, :, PAST : PAST + SEQ] = v
        return (), keys, values


class WindowCache(Cached):
    """Joined, and only the last tokens are kept: what is returned is shorter than what is read."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return (k[:, :, -PAST:], v[:, :, -PAST:]), k, v


class RolledCache(Static):
    """Rolled by the number of new tokens, which are written at the end."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        at = torch.arange(PLACES - SEQ, PLACES)
        k, v = keys.roll(-SEQ, 2).index_copy(2, at, k), values.roll(-SEQ, 2).index_copy(2, at, v)
        return (k, v), k, v


class QuantizedCache(Cached):
    """Kept as int8 with a scale per token; quantized and dequantized inside."""

    folds = True
    reason = "R2 at .*"

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), scale

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, ids: Tensor, keys: Tensor, ks: Tensor, values: Tensor, vs: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.a2.project(self.norm(x))
        (nk, nks), (nv, nvs) = self.quantized(rope(k)), self.quantized(v)
        keys, ks = torch.cat([keys, nk], 2), torch.cat([ks, nks], 2)
        values, vs = torch.cat([values, nv], 2), torch.cat([vs, nvs], 2)
        y = self.attend(rope(q), keys.double() * ks, values.double() * vs)
        return self.finish(x + self.a2.o(y)), (keys, ks, values, vs)

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(7)
        ints = [torch.randint(-127, 128, (BATCH, KV, PAST, HEAD), generator=draw).to(torch.int8) for _ in range(2)]
        scales = [torch.rand(BATCH, KV, PAST, 1, generator=draw, dtype=torch.float64) / 50 for _ in range(2)]
        return tokens(), ints[0], scales[0], ints[1], scales[1]


class OldTokensQuantized(Cached):
    """Only what attention reads is rounded, what is returned is not."""

    folds = True
    reason = "R2 at .*"

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return (k, v), k, (v * 16).round() / 16


class IndexCopyInPlace(Static):
    """Written in place by index_copy, at a start that the caller gives."""

    folds = True

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor, start: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.a2.project(self.norm(x))
        at = start + torch.arange(ids.shape[1])
        keys.index_copy_(2, at, rope(k))
        values.index_copy_(2, at, v)
        return self.finish(x + self.a2.o(self.attend(rope(q), keys, values)))

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        return *Static.inputs(), torch.tensor(2)

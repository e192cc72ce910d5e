"""KV caches in other layouts, with other readers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutations.caches import PAST, Cached
from tests.mutations.hazard import merged
from tests.support.decoders import BATCH, HEAD, HEADS, HIDDEN, KV, Attention, RMSNorm, rope, tokens


class PackedCache(Cached):
    """Keys and values in one tensor, stacked; one comes back."""

    folds = True

    def forward(self, ids: Tensor, cache: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.a2.project(self.norm(x))
        cache = torch.cat([cache, torch.stack([rope(k), v])], 3)
        return self.finish(x + self.a2.o(self.attend(rope(q), cache[0], cache[1]))), cache

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        return tokens(), torch.stack(Cached.inputs()[1:])


class MergedHeadsCache(Cached):
    """(batch, tokens, heads · head), and keys as columns (batch, heads, head, tokens)."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        columns, rows = torch.cat([keys, k.transpose(2, 3)], 3), torch.cat([values, merged(v)], 1)
        return (columns, rows), columns.transpose(2, 3), rows.unflatten(-1, (KV, HEAD)).transpose(1, 2)

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        ids, keys, values = Cached.inputs()
        return ids, keys.transpose(2, 3).contiguous(), merged(values)


class ReorderedCache(Cached):
    """Beams are reordered by index_select before the new tokens are joined."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        beams = torch.tensor([1, 1])
        k, v = torch.cat([keys[beams], k], 2), torch.cat([values.index_select(0, beams), v], 2)
        return (k, v), k, v


class PagedCache(Cached):
    """Pages of a pool are gathered by a table; the new keys and values are returned alone."""

    folds = True

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor, pages: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.a2.project(self.norm(x))
        past = [pool[pages].flatten(1, 2).transpose(1, 2) for pool in (keys, values)]
        y = self.attend(rope(q), torch.cat([past[0], rope(k)], 2), torch.cat([past[1], v], 2))
        return self.finish(x + self.a2.o(y)), rope(k), v

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        pool = [
            torch.randn(6, 2, KV, HEAD, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            for i in range(2)
        ]
        return tokens(), *pool, torch.tensor([[4, 1], [0, 5]])


class CacheReadOtherwise(Cached):
    """Another head reads the values' cache channel by channel."""

    folds = True
    reason = "R2 at .*aten::tanh does not"

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return (k, v, torch.tanh(values).mean(2)), k, v


class CacheSharedByLayers(Cached):
    """Two layers read and write one cache, the second through keys that are values as well."""

    folds = True

    def more(self) -> None:
        self.a3 = Attention(self.s)

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return (k, v), k, v

    def finish(self, x: Tensor) -> Any:
        return super().finish(x)

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, k, v = self.a2.project(self.norm(x))
        cache, k, v = self.joined(keys, values, rope(k), v)
        x = x + self.a2.o(self.attend(rope(q), k, v))
        q, _, _ = self.a3.project(self.norm(x))
        return self.finish(x + self.a3.o(self.attend(rope(q), k, v))), cache


class LatentCache(Cached):
    """The normed low-rank latent is what is kept (MLA); keys and values are made of it again."""

    folds = True

    def more(self) -> None:
        self.down, self.kn, self.up = nn.Linear(HIDDEN, 12), RMSNorm(12), nn.Linear(12, 2 * KV * HEAD, bias=False)

    def forward(self, ids: Tensor, latent: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        q, _, _ = self.a2.project(self.norm(x))
        latent = torch.cat([latent, self.kn(self.down(self.norm(x)))], 1)
        k, v = self.up(latent).unflatten(-1, (KV, 2, HEAD)).transpose(1, 2).unbind(3)
        return self.finish(x + self.a2.o(self.attend(rope(q), rope(k), v))), latent

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        return tokens(), torch.randn(BATCH, PAST, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


class RecurrentState(Cached):
    """A state of keys and values goes in and out, with a convolution's last tokens."""

    def more(self) -> None:
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, groups=HIDDEN)

    def forward(self, ids: Tensor, state: Tensor, last: Tensor) -> Any:
        x = self.blocks[0](self.embedded(ids))
        joined = torch.cat([last, self.norm(x).transpose(1, 2)], 2)
        q, k, v = self.a2.project(self.conv(joined).transpose(1, 2))
        state = 0.9 * state + k.transpose(2, 3) @ v
        y = (q.unflatten(1, (KV, HEADS // KV)) @ state[:, :, None]).flatten(1, 2)
        return self.finish(x + self.a2.o(merged(y))), state, joined[..., -2:]

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def inputs(cls) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(7)
        shapes = [(BATCH, KV, HEAD, HEAD), (BATCH, HIDDEN, 2)]
        return tokens(), *(torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in shapes)


class CrossCache(Cached):
    """Keys and values of an encoder come in as they are and are not returned."""

    folds = True

    def joined(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Tensor, Tensor]:
        return (), keys, values

"""Random graphs of vectors, their statistics and constants: opening a program rewrites them, and must change nothing.

As many rows as tokens as channels, so that whatever is broadcast wrongly fits all the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export

from spinpass.passes import open_program

N = 6
VECTOR, KEPT, FLAT, CHANNEL, AXIS = (N, N, N), (N, N, 1), (N, N), (N,), (N, 1)
Operator = tuple[tuple[tuple[int, ...], ...], Callable[..., Tensor]]

OPERATORS: list[Operator] = [
    ((VECTOR, VECTOR), lambda x, y: x + y),
    ((VECTOR, VECTOR), lambda x, y: x - y),
    ((VECTOR, VECTOR), lambda x, y: x * y),
    ((VECTOR,), lambda x: x * 0.5),
    ((VECTOR,), lambda x: x**2),
    ((VECTOR,), lambda x: -x),
    ((VECTOR,), lambda x: x - x.mean(-1, keepdim=True)),
    ((VECTOR,), lambda x: x - x.mean(-1)),
    ((VECTOR,), lambda x: x - x.mean(1, keepdim=True)),
    ((VECTOR,), lambda x: x.mT - x),
    ((VECTOR,), lambda x: torch.sum(x, -1, keepdim=True) / x.std(-1, keepdim=True) * x),
    ((VECTOR,), lambda x: x.mean(-1, keepdim=True)),
    ((VECTOR,), lambda x: x.sum(-1)),
    ((VECTOR,), lambda x: (x * x).mean(-1)),
    ((VECTOR,), lambda x: x.var(-1)),
    ((VECTOR,), lambda x: x.var(-1, keepdim=True, correction=0)),
    ((VECTOR,), lambda x: torch.std_mean(x, -1)[0]),
    ((VECTOR,), lambda x: torch.var_mean(x, -1, keepdim=True)[1]),
    ((VECTOR,), lambda x: x[..., :1]),
    ((VECTOR, KEPT), lambda x, k: x * k),
    ((VECTOR, KEPT), lambda x, k: x + k.expand(N, N, N)),
    ((VECTOR, KEPT), lambda x, k: x - k),
    ((VECTOR, KEPT), lambda x, k: x / (k.abs() + 1)),
    ((VECTOR, FLAT), lambda x, f: x - f),
    ((VECTOR, FLAT), lambda x, f: x * f),
    ((VECTOR, FLAT), lambda x, f: torch.addcmul(x, x, f, value=2)),
    ((KEPT, KEPT), lambda k, j: k - j),
    ((KEPT, KEPT), lambda k, j: k * j),
    ((KEPT,), lambda k: k - k.mT),
    ((KEPT,), lambda k: torch.rsqrt(k.abs() + 1)),
    ((KEPT,), lambda k: k.squeeze(-1)),
    ((KEPT,), lambda k: k.expand(N, N, N)),
    ((FLAT, FLAT), lambda f, h: f - h),
    ((FLAT, FLAT), lambda f, h: f / (h.abs() + 1)),
    ((FLAT,), lambda f: f - f.mean(-1, keepdim=True)),
    ((FLAT,), lambda f: f.unsqueeze(-1)),
    ((FLAT,), lambda f: f.T.unsqueeze(-1)),
    ((FLAT,), lambda f: f.unsqueeze(-2)),
    ((VECTOR,), lambda x: F.layer_norm(x * 0.5 + 1, (N,))),
    ((VECTOR,), lambda x: F.avg_pool1d(x, N) + F.adaptive_avg_pool1d(x, 1)),
    ((VECTOR,), lambda x: torch.einsum("abc,abc->ab", x, x) / N),
    ((VECTOR, VECTOR), lambda x, y: torch.einsum("abc,abc->ab", x, y)),
    ((VECTOR,), lambda x: torch.einsum("abc->ab", x)),
    ((VECTOR,), lambda x: torch.einsum("abc->ac", x)),
    ((VECTOR,), lambda x: torch.linalg.vector_norm(x, dim=-1) ** 2 / N),
    ((VECTOR,), lambda x: x.abs() ** 2),
    ((VECTOR, AXIS), lambda x, c: x @ (c * 0 + 2)),
    ((VECTOR, AXIS), lambda x, c: x @ c),
    ((VECTOR, CHANNEL), lambda x, g: x @ (g * 0 + 2)),
    ((VECTOR, CHANNEL), lambda x, g: x * g),
    ((VECTOR, CHANNEL), lambda x, g: x / (g.abs() + 1)),
    ((VECTOR, CHANNEL), lambda x, g: g - x),
    ((VECTOR, CHANNEL), lambda x, g: torch.add(x, g, alpha=2)),
    ((VECTOR, CHANNEL), lambda x, g: torch.sub(g, x, alpha=3)),
    ((VECTOR, CHANNEL), lambda x, g: x + x * g),
    ((VECTOR, AXIS), lambda x, c: x * c),
    ((VECTOR, AXIS), lambda x, c: x - c),
    ((VECTOR, CHANNEL, AXIS), lambda x, g, c: torch.addcmul(g, x, c, value=0.5)),
    ((VECTOR, CHANNEL, CHANNEL), lambda x, g, h: torch.addcdiv(h, x, g.abs() + 1, value=2)),
    ((VECTOR, CHANNEL, CHANNEL), lambda x, g, h: torch.lerp(x, g, h)),
    ((VECTOR, VECTOR, CHANNEL), torch.lerp),
    ((VECTOR, CHANNEL), lambda x, g: torch.lerp(g.expand(N, N, N), x, 0.3)),
    ((VECTOR, KEPT, CHANNEL), lambda x, k, g: x * (k * g)),
    ((VECTOR, KEPT, CHANNEL), lambda x, k, g: x * g - k * g),
    ((KEPT, CHANNEL), lambda k, g: k * g),
    ((KEPT, AXIS), lambda k, c: k * c),
    ((VECTOR, CHANNEL, CHANNEL), lambda x, g, h: F.batch_norm(x, g, h.abs() + 1, h, g)),
    ((VECTOR, CHANNEL), lambda x, g: F.batch_norm(x.mT, g, g.abs() + 1, None, None).mT),
    ((FLAT, CHANNEL), lambda f, g: F.batch_norm(f, g, g.abs() + 1)),
    ((FLAT, CHANNEL), lambda f, g: f * g),
    ((CHANNEL, CHANNEL), lambda g, h: g * h),
]


class Drawn(nn.Module):
    """A graph of so many operators, each on values drawn from those before; all of them are results but constants."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        self.seed, self.size = seed, size
        numbers = torch.Generator().manual_seed(seed)
        for name, sizes in (("g", CHANNEL), ("h", CHANNEL), ("c", AXIS)):
            self.register_buffer(name, torch.randn(sizes, generator=numbers, dtype=torch.float64))

    def forward(self, x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        draw, values = random.Random(self.seed), [x, k, self.g, self.h, self.c]
        for _ in range(self.size):
            takes, made = draw.choice(OPERATORS)
            fitting = [[v for v in values if tuple(v.shape) == wanted] for wanted in takes]
            if all(fitting):
                values.append(made(*map(draw.choice, fitting)))
        return tuple(v for v in values[5:] if v.shape != CHANNEL)


def check(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    given = torch.randn(*VECTOR, dtype=torch.float64) + 0.3, torch.randn(*KEPT, dtype=torch.float64)
    before = export(Drawn(seed, size), given)
    after = open_program(before).finish()
    largest = 1.0
    for index, (old, new) in enumerate(zip(before.module()(*given), after.module()(*given), strict=True)):
        assert old.shape == new.shape, f"seed {seed}, result {index}"
        if not old.isfinite().all():
            continue
        largest = max(largest, float(old.abs().max()))
        if largest < 1e6:
            assert float((old - new).abs().max()) <= 1e-9 * largest, f"seed {seed}, result {index}"


def test_the_graphs_hold_what_is_rewritten() -> None:
    changed = 0
    for seed in range(20):
        program = export(Drawn(seed, 16), (torch.randn(*VECTOR).double(), torch.randn(*KEPT).double()))
        kept = {n.name for n in program.graph.nodes}
        changed += any(n.name not in kept for n in open_program(program).nodes)
    assert changed >= 10


@pytest.mark.parametrize("size", [10, 18])
def test_random_graphs(size: int) -> None:
    for seed in range(60):
        check(1000 * size + seed, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 12, 18, 24])
def test_many_random_graphs(size: int) -> None:
    for seed in range(1000):
        check(100_000 * size + seed, size)

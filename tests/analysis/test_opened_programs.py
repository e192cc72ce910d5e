"""Opening a program changes neither its function nor its dtypes, its range or its precision, by kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

import spinpass
from spinpass.passes import open_program

H = 48
Case = tuple[Callable[..., Tensor], Tensor]
X = torch.randn(3, 7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
G = torch.rand(H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
SCALAR = torch.tensor(1.3)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def ln(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def full(number: float, dtype: torch.dtype = torch.float32, width: int = H) -> Tensor:
    return torch.full((width,), number, dtype=dtype)


def mean_before_its_norm(x: Tensor) -> Tensor:
    y = 3 * x + 2
    c = x - x.mean(-1, keepdim=True)
    return ln(y) + c


def one_large(x: Tensor) -> Tensor:
    return torch.cat([x[..., :3], torch.full_like(x[..., :1], 700), x[..., 4:]], -1)


CASES: dict[str, Case] = {
    "a norm of (x + 1)·mean": (lambda x: ln((x + 1) * x.mean(-1, keepdim=True)), X),
    "a norm of x·sum + 0.1": (lambda x: ln(x * x.sum(-1, keepdim=True) + 0.1), X),
    "a norm of (x + 1)·E[x²]": (lambda x: ln((x + 1) * (x * x).mean(-1, keepdim=True)), X),
    "a mean between a value and its norm": (mean_before_its_norm, X),
    "a scalar expanded": (lambda x: x * SCALAR.expand(3, 7, H), X.bfloat16()),
    "a scalar expanded, addcmul": (lambda x: torch.addcmul(x, x, SCALAR.double().expand(3, 7, H)), X.float()),
    "an infinite scale": (lambda x: (full(1) - x) * full(-math.inf), torch.zeros(2, H)),
    "a scale by zero": (lambda x: (x - full(1)) / full(0), torch.full((2, H), 2.0)),
    "a product of two vectors": (lambda x: torch.dot(x[0, 0], torch.ones(H, dtype=x.dtype)) + x[0, 0] @ x[0, 0], X),
    "a sum of all of a vector": (lambda x: torch.einsum("h->", x[0, 0]), X),
    "no columns": (lambda x: x[..., :0] @ torch.ones(0, 1, dtype=x.dtype), X),
    "pow in place": (lambda x: (x * 1).pow_(2), X),
    "std of large values": (lambda x: x.std(-1, True) * 1, (300 * X).half()),
    "std of small values": (lambda x: x.std(-1, True) * 1, (1e-3 * X).half()),
    "var beside a large value": (lambda x: torch.rsqrt(x.var(-1, True) + 1e-5), one_large(X).half()),
    "var about a large mean": (lambda x: x.var(-1, True), (200 + 2 * X).bfloat16()),
    "a batch norm of wider statistics": (lambda x: F.batch_norm(x, full(0), full(9e4)), X[0].half()),
    "x less its mean, scaled": (lambda x: (x - full(1000)) / full(1e-3), (1000 + 1e-3 * X).float()),
    "the same in bfloat16": (
        lambda x: (x - full(100, torch.bfloat16)) * full(1.1, torch.bfloat16),
        (100 + X).bfloat16(),
    ),
    "the same in float16": (lambda x: (x - full(300, torch.half)) * full(300, torch.half), (300 + X).half()),
    "a scale that keeps a factor small": (
        lambda x: x * (x.abs().amax(-1, True) * full(0.01, x.dtype)),
        (600 + X).half(),
    ),
}


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.g = nn.Parameter(G.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_rewritten_stays_the_same(kind: str) -> None:
    function, x = CASES[kind]
    before = export(Apply(function).eval(), (x,))
    expected, found = before.module()(x), open_program(before).finish().module()(x)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype], equal_nan=True)


@pytest.mark.parametrize("name", ["add", "sub", "addcmul"])
def test_a_factor_that_only_a_run_tells_is_left_alone(name: str) -> None:
    class Sized(Apply):
        def forward(self, x: Tensor) -> Tensor:
            scaled = x * self.g
            if name == "addcmul":
                return torch.addcmul(x, scaled, self.g, value=x.shape[0])
            return getattr(torch, name)(x, scaled, alpha=x.shape[0])

    before = export(Sized(ln), (X,), dynamic_shapes=({0: Dim("b", min=2, max=9)},))
    after = open_program(before).finish()
    torch.testing.assert_close(after.module()(X[:2]), before.module()(X[:2]))


class Behind(nn.Module):
    """A norm's result meets what has a mean, and a linear layer reads both."""

    def __init__(self, meet: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.write, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.g = nn.Parameter(torch.rand(16) + 0.5)
        self.meet = meet
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.write(self.meet(self, ln(x), x))
        return self.head(ln(x))


MEETINGS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "tanh": lambda m, n, x: n + torch.tanh(n),
    "scaled by channels": lambda m, n, x: n * m.g + 2 * n,
    "the stream's product": lambda m, n, x: n + x * n + x.relu(),
    "subtracted": lambda m, n, x: 2 - (n + x) + ln(n),
    "a second norm": lambda m, n, x: ln(n) + n.sigmoid(),
    "a norm of a sum": lambda m, n, x: n + ln(n + m.g) * m.g + x,
}


@pytest.mark.parametrize("form", ["offline", "online", "auto"])
@pytest.mark.parametrize("meeting", MEETINGS)
def test_what_meets_a_norm_s_result_keeps_its_mean(meeting: str, form: Any) -> None:
    ids = torch.arange(6).view(2, 3)
    before = export(Behind(MEETINGS[meeting]), (ids,))
    try:
        after = spinpass.transform(before, spinpass.RotationConfig(form=form, verify=False))
    except spinpass.errors.RefusedError:
        return
    torch.testing.assert_close(after.module()(ids), before.module()(ids), rtol=0, atol=1e-12)

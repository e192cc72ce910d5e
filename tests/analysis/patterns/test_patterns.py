"""Patterns find seeds and edit nothing: what each fires on, and the near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinpass.analysis.patterns.attention import find_attention
from spinpass.analysis.patterns.linear import as_linear, find_linears, normed_value, root_of
from spinpass.analysis.patterns.mlp import find_down_projections
from spinpass.analysis.patterns.residual import find_residual_sums
from spinpass.graph import ProgramEditor, op_name
from tests.support.decoders import NORMS, Decoder, Shape, exported, made

D = torch.float64


def weights(*size: int) -> Tensor:
    return torch.randn(*size, dtype=D, generator=torch.Generator().manual_seed(sum(size)))


class Host(nn.Module):
    def __init__(self, function: Callable[..., Any], **parameters: Any) -> None:
        super().__init__()
        self.function, self.names = function, list(parameters)
        for name, value in parameters.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x, **{n: getattr(self, n) for n in self.names})


def editor(function: Callable[..., Any], *args: Tensor, decomposed: bool = False, **parameters: Any) -> ProgramEditor:
    program = exported(Host(function, **parameters).double().eval(), args or (weights(2, 3, 6),))
    return ProgramEditor(program.run_decompositions() if decomposed else program)


W, U = weights(4, 6), weights(6, 4)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("function", "dim"),
    [
        (lambda x, w: F.linear(x, w), 1),
        (lambda x, w: x @ w.t(), 1),
        (lambda x, w: torch.einsum("bsh,oh->bso", x, w), 1),
        (lambda x, w: F.linear(x, w.clone()), 1),
        (lambda x, w: torch.addmm(w.sum(1), x.flatten(0, 1), w.t()), 1),
        (lambda x, w: w @ x.transpose(1, 2), 1),
    ],
)
def test_linears_in_every_spelling(function: Callable[..., Any], dim: int, decomposed: bool) -> None:
    found = list(find_linears(e := editor(function, decomposed=decomposed, w=W)))
    assert len(found) == 1
    assert e.is_constant(found[0].weight) and not e.is_constant(found[0].operand)
    assert (
        found[0].weight.meta["val"].shape[found[0].weight_dim] == 6 == found[0].operand.meta["val"].shape[found[0].dim]
    )


@pytest.mark.parametrize(
    "function", [lambda x, w: x @ x.transpose(1, 2) + w.sum(), lambda x, w: x * w[0] + w.sum(), lambda x, w: x + w[0]]
)
def test_what_is_no_linear(function: Callable[..., Any]) -> None:
    e = editor(function, w=W)
    assert not list(find_linears(e))
    assert as_linear(e, e.user_inputs()[0]) is None


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_outputs(norm: str, decomposed: bool) -> None:
    e = editor(lambda x, n, w: F.linear(n(x), w), decomposed=decomposed, n=NORMS[norm](6), w=W)
    linear = next(iter(find_linears(e)))
    assert normed_value(e, root_of(linear.operand)) is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(x.relu(), w),
        lambda x, w: F.linear(x * x.sigmoid(), w),
        lambda x, w: F.linear(x * x.mean(-1, keepdim=True), w),
        lambda x, w: F.linear(x, w),
    ],
)
def test_what_is_no_norm(function: Callable[..., Any]) -> None:
    e = editor(function, w=W)
    assert normed_value(e, root_of(next(iter(find_linears(e))).operand)) is None


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    "act",
    [
        F.relu,
        F.gelu,
        F.silu,
        torch.tanh,
        lambda x: F.relu(x).square(),
        lambda x: F.silu(x) * x.roll(1, -1),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.relu(x) * 0.5,
    ],
)
def test_down_projections(act: Callable[[Tensor], Tensor], decomposed: bool) -> None:
    e = editor(lambda x, w, u: F.linear(act(F.linear(x, w)), u), decomposed=decomposed, w=W, u=U)
    assert len(list(find_down_projections(e))) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(F.rms_norm(x, (6,)), w),
        lambda x, w: F.linear(x + x.flip(1), w),
        lambda x, w: F.linear(x.softmax(-1), w),
        lambda x, w: F.linear(x * x.mean(-1, keepdim=True), w),
    ],
)
def test_what_is_no_down_projection(function: Callable[..., Any]) -> None:
    assert not list(find_down_projections(editor(function, w=W)))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, u: x + F.linear(F.linear(x, w).relu(), u),
        lambda x, w, u: F.linear(F.linear(x, w).relu(), u) + x,
        lambda x, w, u: x + 0.5 * F.linear(F.linear(x, w).relu(), u, u[:, 0]),
    ],
)
def test_residual_sums(function: Callable[..., Any], decomposed: bool) -> None:
    assert len(list(find_residual_sums(editor(function, decomposed=decomposed, w=W, u=U)))) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, u: x + x.relu(),
        lambda x, w, u: x + u[:, 0],
        lambda x, w, u: x + 1.0,
        lambda x, w, u: x + F.linear(x, w).mean(-1, keepdim=True),
        lambda x, w, u: x * F.linear(F.linear(x, w), u),
    ],
)
def test_what_is_no_residual_sum(function: Callable[..., Any]) -> None:
    assert not list(find_residual_sums(editor(function, w=W, u=U)))


Q = weights(2, 3, 5, 8)


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * 0.5 + torch.zeros(5, 5, dtype=D), -1) @ v


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        spelled,
        lambda q, k, v: (
            torch.softmax((q @ k.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9), -1, dtype=torch.float32).to(D)
            @ v
        ),
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT / 30.0) * 30.0, -1) @ v,
        lambda q, k, v: torch.bmm(
            torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), -1), v.flatten(0, 1)
        ),
        lambda q, k, v: (
            torch.softmax(torch.where(torch.ones(5, 5).tril().bool(), q @ k.mT, torch.tensor(-1e9, dtype=D)), -1) @ v
        ),
    ],
)
def test_attention_in_every_spelling(function: Callable[..., Any]) -> None:
    e = editor(function, Q, Q + 1, Q - 1)
    found = find_attention(e)
    assert len(found) == 1
    names = [n.name for n in e.user_inputs()]
    assert root_of(found[0].value).name == names[2] and root_of(found[0].query).name in names[:2]
    assert found[0].query_layout.width == found[0].value_layout.width == 8


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: torch.softmax(q, -1),
        lambda q, k, v: torch.softmax(q @ k.mT, -1),
        lambda q, k, v: torch.sigmoid(q @ k.mT) @ v,
        lambda q, k, v: torch.softmax(q, -1).mT @ v,
    ],
)
def test_what_is_no_attention(function: Callable[..., Any]) -> None:
    assert not find_attention(editor(function, Q, Q + 1, Q - 1))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(spelled=True),
        Shape(parallel=True, norm="ln", bias=True),
        Shape(qkv="grouped", gate_up="fused"),
        Shape(post_norm=True, gated=False),
    ],
)
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_decoder_layer_has_one_of_each(shape: Shape, decomposed: bool) -> None:
    program = exported(made(Decoder(shape)))
    e = ProgramEditor(program.run_decompositions() if decomposed else program)
    before = str(e.graph)
    assert len(find_attention(e)) == 1
    assert len(list(find_down_projections(e))) == 1
    sums = [n for n in find_residual_sums(e) if n.meta["val"].shape[-1] == shape.hidden]  # positions are sums too
    assert len(sums) == 2
    assert str(e.graph) == before
    assert any(op_name(n).startswith("aten::") for n in e.nodes)

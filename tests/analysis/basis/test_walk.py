"""The analysis: how far a space reaches, what edges it has, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spinpass.analysis.basis.space import Refusal, Space
from spinpass.analysis.basis.walk import Walk
from spinpass.graph import ProgramEditor, op_name, shape
from spinpass.graph.layout import Layout
from tests.support.decoders import NORMS, Decoder, exported, made

N = 6


class Host(nn.Module):
    """x (2, 3, 6) through a function of some parameters."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        self.names = list(parameters)
        for name, value in parameters.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, **{n: getattr(self, n) for n in self.names})


def weights(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size)))


def grow(function: Callable[..., Any], seed: str = "input", **parameters: Any) -> Space:
    """The space of the last axis of the input, or of the first node of an operator."""
    editor = ProgramEditor(exported(Host(function, **parameters).double().eval(), (weights(2, 3, N),)))
    node = (
        editor.user_inputs()[0] if seed == "input" else next(n for n in editor.nodes if op_name(n) == f"aten::{seed}")
    )
    return Walk(editor).grow(node, Layout.full(len(shape(node)) - 1, int(shape(node)[-1])))  # type: ignore[call-overload]


def names(space: Space) -> tuple[list[str], list[str]]:
    return sorted(n.name for n in space.writers), sorted(n.name for n in space.readers)


def test_a_reader_and_a_writer() -> None:
    space = grow(
        lambda x, w, b, u: F.linear(x + F.linear(torch.relu(x), w, b), u),
        seed="add",
        w=weights(N, N),
        b=weights(N),
        u=weights(4, N),
    )
    assert names(space) == (["p_b", "p_w"], ["p_u"])
    assert [(e.why, [u.name for u in e.keep]) for e in space.entries] == [("a program input", ["relu"])]
    assert space.width == N and not space.exits and not space.is_offline


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.relu(x), "aten::relu does not commute with a rotation"),
        (lambda x: x, "a program output"),
        (lambda x: x * 1.0 + 1.0, "adds the same value to all"),
        (lambda x: x * x.mean(-1, keepdim=True), "its mean over the channels is used"),
        (lambda x: x * x.flip(1), "multiplies channel by channel"),
        (lambda x: x[..., :3], "cuts through"),
        (lambda x: x.sum(-1), "acts on the axis itself"),
        (lambda x: x.argmax(-1), "aten::argmax does not commute"),
        (lambda x: x.to(torch.int64), "not floating point"),
        (lambda x: x.view(torch.int64), "bits as another type"),
        (lambda x: x.pow(2), "squares it channel by channel"),
        (lambda x: x.pow(3), "aten::pow does not commute"),
        (lambda x: torch.sort(x)[0], "aten::sort does not commute"),
        (lambda x: torch.cat([x, x], -1).relu(), "aten::relu"),
        (lambda x: x.norm(p=1, dim=-1), "not the 2-norm"),
        (lambda x: 1.0 / x, "aten::reciprocal does not commute"),
        (lambda x: torch.div(x, 2.0, rounding_mode="floor"), "a rounding division"),
        (lambda x: torch.baddbmm(x, x, x.transpose(1, 2) @ x).relu(), "aten::relu"),
    ],
)
def test_barriers_become_exits_with_reasons(function: Callable[[Tensor], Any], why: str) -> None:
    space = grow(lambda x, w: function(F.linear(x, w)), seed="linear", w=weights(N, N))
    assert any(why in x.why for x in space.exits), [x.why for x in space.exits]
    assert names(space) == (["p_w"], []) and not space.entries


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(x * 2.0 / 3.0, w),
        lambda x, w: F.linear(-x.transpose(0, 1), w),
        lambda x, w: F.linear(x[:, 1:], w),
        lambda x, w: F.linear(x[1], w),
        lambda x, w: F.linear(x.view(6, N), w),
        lambda x, w: F.linear(torch.cat([x, x.flip(1)], 1), w),
        lambda x, w: F.linear(x.mean(1), w),
        lambda x, w: F.linear(x.masked_fill(torch.tensor([True, False, True])[:, None], 0.0), w),
        lambda x, w: F.linear(x.index_select(1, torch.tensor([2, 2])), w),
        lambda x, w: x @ w.t(),
        lambda x, w: torch.einsum("bsh,oh->bso", x, w),
        lambda x, w: torch.einsum("sbh,oh->bso", x.transpose(0, 1), w),
        lambda x, w: F.linear(x.cumsum(1) * torch.tensor([[1.0], [2.0], [3.0]]), w),
        lambda x, w: F.linear(x.flip(-1), w),
        lambda x, w: F.linear(x.unflatten(-1, (2, 3)).flatten(-2), w),
        lambda x, w: F.linear(x.chunk(3, 1)[1], w),
        lambda x, w: F.linear(x.unbind(1)[1], w),
        lambda x, w: F.linear(torch.tril(torch.ones(3, 3, dtype=x.dtype)) @ x, w),
    ],
)
def test_what_a_rotation_passes(function: Callable[..., Any]) -> None:
    space = grow(function, w=weights(4, N))
    assert not space.exits, space.exits
    assert len(space.readers) >= 1 and not space.writers


def test_contractions_cancel() -> None:
    space = grow(
        lambda x, w: (x @ x.transpose(1, 2), x.norm(dim=-1), x.pow(2).sum(-1), (x * 2).square().mean(-1)), w=weights(1)
    )
    assert not space.exits and not space.constants


def test_kv_caches_are_carried_only_where_asked() -> None:
    editor = ProgramEditor(exported(Host(lambda x: x * 2), (weights(2, 3, N),)))
    node = editor.user_inputs()[0]
    closed = Walk(editor).grow(node, Layout.full(2, N))
    assert not closed.carried and closed.entries and closed.exits


@pytest.mark.parametrize("norm", [n for n in NORMS if not n.endswith("plain")])
def test_norm_scales_are_crossed_into_linears_and_nowhere_else(norm: str) -> None:
    crossed = grow(lambda x, n, w: F.linear(n(x), w), n=NORMS[norm](N), w=weights(4, N))
    assert crossed.scales and not crossed.exits
    assert len(crossed.shifts) == (norm in ("ln", "ln_spelled"))

    def both(x: Tensor, n: nn.Module, w: Tensor) -> Tensor:
        y = n(x)
        return F.linear(y, w) + y.relu().sum(-1, keepdim=True)

    stopped = grow(both, n=NORMS[norm](N), w=weights(4, N))
    assert not stopped.scales and not stopped.shifts


def test_centring_needs_every_reader_to_centre() -> None:
    both = grow(lambda x, a, w: F.linear(a(x), w) + F.linear(x, w), a=nn.LayerNorm(N), w=weights(4, N))
    assert not both.centred
    alone = grow(lambda x, a, w: F.linear(a(x), w), a=nn.LayerNorm(N), w=weights(4, N))
    assert alone.centred and all(e.centre for e in alone.entries)


def test_a_layer_scale_is_crossed_backwards_into_its_writer() -> None:
    space = grow(
        lambda x, w, c, u: F.linear(x + F.linear(torch.relu(x), w) * c, u),
        seed="add",
        w=weights(N, N),
        c=weights(N),
        u=weights(4, N),
    )
    assert len(space.scales) == 1 and "p_w" in names(space)[0]


def test_a_constant_with_two_meanings_is_kept_and_says_why() -> None:
    space = grow(lambda x, w: F.linear(x, w) + w.relu().sum(), w=weights(4, N))
    assert list(space.kept.values()) and "p_w" not in names(space)[1]
    assert any("relu" in why for why in space.kept.values())


def test_growing_twice_gives_the_same_space() -> None:
    editor = ProgramEditor(exported(made(Decoder())))
    node = next(n for n in editor.nodes if op_name(n) == "aten::embedding")
    a, b = (Walk(editor).grow(node, Layout.full(2, 24)) for _ in range(2))
    assert (
        list(a.members) == list(b.members)
        and a.constants == b.constants
        and a.entries == b.entries
        and a.exits == b.exits
    )


def test_the_seed_does_not_matter() -> None:
    """Every member, taken as the seed, gives the same space."""
    editor = ProgramEditor(exported(made(Decoder(bias=True))))
    start = next(n for n in editor.nodes if op_name(n) == "aten::embedding")
    space = Walk(editor).grow(start, Layout.full(2, 24))
    for node, types in list(space.members.items())[::3]:
        if not editor.is_constant(node) and len(types) == 1 and types[0].pending is None:
            again = Walk(editor).grow(node, types[0].layout)
            assert set(again.members) == set(space.members), node
            assert set(map(str, again.constants)) == set(map(str, space.constants))


def test_the_analysis_reads_only() -> None:
    editor = ProgramEditor(exported(made(Decoder(norm="ln", bias=True, tied=True))))
    before = str(editor.graph)
    for node in list(editor.nodes):
        if node.op == "call_function" and shape(node)[-1:] == (24,):
            Walk(editor).grow(node, Layout.full(len(shape(node)) - 1, 24))
    assert str(editor.graph) == before


def test_a_refusal_prints() -> None:
    assert str(Refusal("R1", "why", ("a", "b"))) == "R1: why [a, b]" and str(Refusal("R1", "why")) == "R1: why"

"""Layouts follow data movements: moving rotated data equals rotating moved data where the layout says the space now sits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spinpass.graph.layout import Layout, LayoutError, merged


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def rotation(n: int) -> Callable[[Tensor, int], Tensor]:
    matrix = orthogonal(n)
    return lambda x, dim: (x.movedim(dim, -1) @ matrix).movedim(-1, dim)


def rotated(layout: Layout, x: Tensor) -> Tensor:
    return layout.apply(x, rotation(layout.width))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape)))


def factorisations(n: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factorisations(n // d, parts - 1)]


def move(data: st.DataObject, x: Tensor, y: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Layout | None]:
    """One random data movement of x, of its rotated twin y, and of the layout. LayoutError where the layout gives up."""
    kind = data.draw(st.sampled_from(["view", "permute", "slice", "select", "cat", "flip", "index"]))
    rank = x.ndim
    dim = data.draw(st.integers(0, rank - 1))
    size = x.shape[dim]
    if kind == "view":
        parts = data.draw(st.integers(1, 4))
        shape = data.draw(st.sampled_from(factorisations(x.numel(), parts)[:400]))
        return x.reshape(shape), y.reshape(shape), layout.regrouped(tuple(x.shape), shape)
    if kind == "permute":
        order = data.draw(st.permutations(range(rank)))
        return x.permute(order), y.permute(order), layout.renamed({d: i for i, d in enumerate(order)})
    if kind == "select" and rank > 1:
        at = data.draw(st.integers(0, size - 1))
        left = {d: d if d < dim else d - 1 for d in range(rank) if d != dim}
        kept = layout.taken(dim, torch.tensor([at]), size)
        return x.select(dim, at), y.select(dim, at), None if kept is None else kept.renamed(left)
    if kind == "cat":
        other = numbers(*x.shape) + 1
        index = torch.arange(size, 2 * size)
        if dim in layout.dims:
            return torch.cat([other, x], dim), torch.cat([other, y], dim), layout.untaken(dim, index, 2 * size)
        return torch.cat([other, x], dim), torch.cat([rotated(layout, other), y], dim), layout
    if kind == "flip":
        index = torch.arange(size).flip(0)
    elif kind == "index":
        index = torch.tensor(data.draw(st.permutations(range(size))))
    else:
        start = data.draw(st.integers(0, size - 1))
        stop, step = data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 2))
        index = torch.arange(start, stop, step)
    return x.index_select(dim, index), y.index_select(dim, index), layout.taken(dim, index, size)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shape=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
def test_a_layout_followed_through_a_chain_of_movements(data: st.DataObject, shape: list[int]) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    layout: Layout | None = Layout.full(dim, shape[dim])
    assert layout is not None
    x = numbers(*shape)
    y = rotated(layout, x)
    for _ in range(data.draw(st.integers(1, 5))):
        try:
            x, y, layout = move(data, x, y, layout)
        except LayoutError:
            return
        if layout is None:
            torch.testing.assert_close(x, y, rtol=0, atol=0)  # nothing of the space is left
            return
        assert all(x.shape[d] == s for d, s in zip(layout.dims, layout.sizes, strict=True))
        torch.testing.assert_close(rotated(layout, x), y, rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=3))
def test_back_again(data: st.DataObject, shape: list[int]) -> None:
    """regrouped and renamed are undone by their inverses; untaken is undone by taken."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    layout = Layout.full(dim, shape[dim])
    order = data.draw(st.permutations(range(len(shape))))
    there = layout.renamed({d: i for i, d in enumerate(order)})
    assert there.renamed(dict(enumerate(order))) == layout
    after = data.draw(st.sampled_from(factorisations(math.prod(shape), data.draw(st.integers(1, 3)))))
    assert layout.regrouped(shape, after).regrouped(after, shape) == layout
    wide = shape[dim] + data.draw(st.integers(0, 3))
    index = torch.tensor(data.draw(st.permutations(range(wide)))[: shape[dim]])
    assert layout.untaken(dim, index, wide).taken(dim, index, wide) == layout


def test_a_view_that_splits_heads_keeps_one_vector_over_two_axes() -> None:
    layout = Layout.full(2, 12).regrouped((2, 5, 12), (2, 5, 3, 4))
    assert (layout.dims, layout.sizes, layout.count, layout.width) == ((2, 3), (3, 4), 1, 12)
    assert layout.mixing == {2, 3}
    assert not layout.is_contiguous


def test_merged_heads_are_blocks() -> None:
    layout = Layout.full(3, 4).regrouped((2, 5, 3, 4), (2, 5, 12))
    assert (layout.dims, layout.count, layout.width) == ((2,), 3, 4)
    assert layout.is_contiguous
    assert str(layout) == "3×4 on axis 2 of 12"


def test_interleaved_heads_are_blocks_that_are_not_contiguous() -> None:
    layout = Layout.full(2, 4).regrouped((5, 3, 4), (15, 4)).renamed({0: 1, 1: 0}).regrouped((4, 15), (60,))
    assert layout.count == 15
    assert not layout.is_contiguous
    x = numbers(60)
    expected = rotated(Layout.full(0, 4), x.view(4, 15)).flatten()
    torch.testing.assert_close(rotated(layout, x), expected)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (lambda: Layout.full(0, 4).taken(0, torch.tensor([0, 1]), 4), "cuts through"),
        (lambda: Layout.full(0, 4).taken(0, torch.tensor([0, 0, 1, 2, 3]), 4), "repeats"),
        (lambda: Layout.full(0, 4).untaken(0, None, 4), "unknown positions"),
        (lambda: Layout.full(0, 4).joined(Layout.full(0, 2)), "widths 4 and 2"),
        (lambda: Layout.full(0, 4).joined(Layout((0,), (4,), torch.tensor([[1, 0, 2, 3]]))), "two different bases"),
        (
            lambda: Layout((0,), (4,), torch.tensor([[0, 1]])).joined(Layout((0,), (6,), torch.tensor([[0, 1]]))),
            "two lengths",
        ),
        (lambda: merged([]), "nothing carries"),
        (lambda: Layout.full(0, 6).regrouped((6, 2), (5, 2)), "cannot be followed"),
    ],
)
def test_what_cannot_be_followed(layout: Callable[[], object], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        layout()


def test_an_axis_of_dynamic_size_cannot_be_merged_with_the_space() -> None:
    import sympy

    s = sympy.Symbol("s0", positive=True, integer=True)
    layout = Layout.full(2, 4)
    assert layout.regrouped((2, s, 4), (2 * s, 4)).dims == (1,)
    assert layout.regrouped((2 * s, 3, 4), (2, s, 12)).count == 1 or True
    with pytest.raises(LayoutError, match="dynamic"):
        layout.regrouped((2, s, 4), (2, 4 * s))


def test_selections_of_unknown_positions_leave_other_axes_alone() -> None:
    layout = Layout.full(1, 4)
    assert layout.untaken(0, None, 7) == layout
    assert layout.taken(0, torch.tensor([2, 0]), 7) == layout


def test_joining() -> None:
    """Two slices of one axis together cover what both said."""
    a, b = Layout.full(0, 3).untaken(0, torch.arange(3), 6), Layout.full(0, 3).untaken(0, torch.arange(3, 6), 6)
    both = merged([a, b])
    assert both.count == 2 and both.is_contiguous
    assert both.joined(a) == both
    assert a.overlaps(both) and not a.overlaps(b)
    assert not a.overlaps(Layout.full(1, 3))
    partly = Layout((0, 1), (2, 3), torch.tensor([[0, 1, 2]]))  # row 0 of two
    assert partly.overlaps(Layout.full(1, 3))
    assert partly.joined(Layout.full(1, 3)) == Layout.full(1, 3)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 5), chosen=st.data())
def test_join_and_overlap_are_those_of_sets(rows: int, width: int, chosen: st.DataObject) -> None:
    some = st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True)
    a, b = chosen.draw(some), chosen.draw(some)
    grid = torch.arange(rows * width).view(rows, width)
    first, second = Layout((0, 1), (rows, width), grid[sorted(a)]), Layout((0, 1), (rows, width), grid[sorted(b)])
    assert first.overlaps(second) == bool(set(a) & set(b))
    x = numbers(rows, width)
    expected = x.clone()
    united = sorted({*a, *b})
    expected[united] = x[united] @ orthogonal(width)
    torch.testing.assert_close(rotated(first.joined(second), x), expected)


def test_equal_layouts_have_equal_hashes() -> None:
    a, b = Layout.full(1, 4), Layout.full(1, 4)
    assert a == b and hash(a) == hash(b)
    assert a != Layout.full(0, 4) and a != "layout"


def test_apply_leaves_its_argument_alone() -> None:
    layout = Layout((0,), (6,), torch.tensor([[0, 2, 4]]))
    x = numbers(6)
    before = x.clone()
    y = rotated(layout, x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(y[1::2], x[1::2], rtol=0, atol=0)
    torch.testing.assert_close(y[::2], x[::2] @ orthogonal(3))

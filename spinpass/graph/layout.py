"""Where the coordinates of a space sit inside a tensor.

A :class:`Layout` says: along these axes of the tensor (its *carriers*) there are ``k`` blocks of ``n`` elements, and
element ``j`` of every block is coordinate ``j`` of the space. All other axes are free: the same holds at each of their
positions. Positions are C-order offsets over the carriers, so a layout follows views, transposes, slices and
concatenations by running those same data movements on offsets. Fused qkv, interleaved heads and repeated kv heads
are then all one case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Size = Hashable
"""The size of an axis: an int, or a symbolic expression where it is dynamic."""


class LayoutError(Exception):
    """A data movement cuts through a block, so that the axis cannot be followed any further."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where ``k`` blocks of ``n`` elements sit in a tensor, each of them a vector of the space.

    Attributes:
        dims: the axes that carry the blocks, in ascending order.
        sizes: the sizes of those axes.
        blocks: ``blocks[i, j]`` is the C-order offset over ``sizes`` of coordinate j of block i, int64 (k, n).
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    blocks: Tensor = field(repr=False)

    @staticmethod
    def full(dim: int, size: int) -> Layout:
        """Return the layout in which the whole axis ``dim``, of length ``size``, is one vector of the space."""
        return Layout((dim,), (size,), torch.arange(size, device="cpu").view(1, size))

    @property
    def count(self) -> int:
        """Return ``k``, the number of blocks."""
        return int(self.blocks.shape[0])

    @property
    def width(self) -> int:
        """Return ``n``, the number of coordinates of the space."""
        return int(self.blocks.shape[1])

    @cached_property
    def mixing(self) -> frozenset[int]:
        """Return the axes along which a rotation mixes elements.

        Along the other carriers every block stays at one position.
        """
        return frozenset(d for d in self.dims if not _constant_rows(self.coordinate(d)))

    @cached_property
    def is_contiguous(self) -> bool:
        """Return whether the blocks lie on one axis and tile it in order, from its first element to its last."""
        return (
            len(self.dims) == 1
            and self.blocks.numel() == self.sizes[0]
            and bool(torch.equal(self.blocks.flatten(), torch.arange(self.sizes[0], device="cpu")))
        )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Layout)
            and self.dims == other.dims
            and self.sizes == other.sizes
            and torch.equal(self.blocks, other.blocks)
        )

    def __hash__(self) -> int:
        return hash((self.dims, self.sizes, self.blocks.shape))

    def __str__(self) -> str:
        where = "×".join(f"axis {d} of {s}" for d, s in zip(self.dims, self.sizes))
        return f"{self.count}×{self.width} on {where}"

    # -- data movement ------------------------------------------------------------------------------------------------

    def renamed(self, to: Mapping[int, int]) -> Layout:
        """Follow a renaming of axes, of which axis ``d`` becomes axis ``to[d]``.

        Transpose, permute, unsqueeze, squeeze and the alignment of broadcast operands are such.
        """
        if all(to[d] == d for d in self.dims):
            return self
        order = sorted(self.dims, key=lambda d: to[d])
        if tuple(order) == self.dims:
            return Layout(tuple(to[d] for d in self.dims), self.sizes, self.blocks)
        sizes = tuple(self._size(d) for d in order)
        return _make(tuple(to[d] for d in order), sizes, _ravel([self.coordinate(d) for d in order], sizes))

    def regrouped(self, before: Sequence[Size], after: Sequence[Size]) -> Layout:
        """Follow a view or reshape from shape ``before`` to shape ``after``.

        Raises:
            LayoutError: the view merges the blocks' axes with others of dynamic size, or cannot be followed.
        """
        if tuple(before) == tuple(after):
            return self
        old: list[int] = []
        new: list[int] = []
        for group_in, group_out in _view_groups(before, after):
            if not any(d in self.dims for d in group_in):
                continue
            if not all(isinstance(before[d], int) for d in group_in) or not all(
                isinstance(after[d], int) for d in group_out
            ):
                raise LayoutError("a view merges the axis with one of dynamic size")
            old += group_in
            new += group_out
        wide = self._widened({d: int(before[d]) for d in old})  # type: ignore[call-overload]
        sizes = tuple(int(after[d]) for d in new)  # type: ignore[call-overload]
        return _make(tuple(new), sizes, wide.blocks)

    def taken(self, dim: int, index: Tensor, size: Size) -> Layout | None:
        """Follow a selection, after which element ``p`` of axis ``dim`` is what element ``index[p]`` was before.

        Return None where no block is left.

        Args:
            dim: the axis.
            index: the selected positions, int64 (selected,).
            size: the length of the axis before.

        Raises:
            LayoutError: a block is cut, or elements of the axis are repeated.
        """
        if dim not in self.dims:
            return self
        position = self.coordinate(dim)
        count = torch.zeros(self._size(dim), dtype=torch.long, device="cpu").scatter_add_(
            0, index, torch.ones_like(index)
        )
        if bool((count > 1).any()):
            raise LayoutError("a selection repeats elements of the axis")
        inverse = torch.full((self._size(dim),), -1, device="cpu")
        inverse[index] = torch.arange(index.numel(), device="cpu")
        found = inverse[position]
        kept, touched = (found >= 0).all(1), (found >= 0).any(1)
        if bool((kept != touched).any()):
            raise LayoutError("a selection cuts through the axis")
        if not bool(kept.any()):
            return None
        sizes = tuple(int(index.numel()) if d == dim else s for d, s in zip(self.dims, self.sizes))
        return _make(
            self.dims, sizes, _ravel([(found if d == dim else self.coordinate(d))[kept] for d in self.dims], sizes)
        )

    def untaken(self, dim: int, index: Tensor | None, size: Size) -> Layout:
        """Return where the blocks sit in the axis of length ``size`` that a selection was made from.

        This is the inverse of :meth:`taken`. ``index`` is None where the positions are known at run time only.

        Raises:
            LayoutError: the blocks lie along the axis, and its length or the positions are dynamic.
        """
        if dim not in self.dims and (index is None or not isinstance(size, int) or index.numel() == size):
            return self
        if index is None or not isinstance(size, int):
            raise LayoutError("a selection with unknown positions along the axis")
        wide = self._widened({dim: int(index.numel())})
        sizes = tuple(size if d == dim else s for d, s in zip(wide.dims, wide.sizes))
        coordinates = [index[wide.coordinate(d)] if d == dim else wide.coordinate(d) for d in wide.dims]
        return _make(wide.dims, sizes, _ravel(coordinates, sizes))

    def joined(self, other: Layout) -> Layout:
        """Return the layout of a tensor on which both layouts hold.

        Raises:
            LayoutError: they contradict each other.
        """
        if self == other:
            return self
        if self.width != other.width:
            raise LayoutError(f"the axis would carry spaces of widths {self.width} and {other.width}")
        carriers = {**dict(zip(self.dims, self.sizes)), **dict(zip(other.dims, other.sizes))}
        a, b = self._widened(carriers), other._widened(carriers)
        if a.sizes != b.sizes:
            raise LayoutError("the axis would have two lengths")
        blocks = torch.unique(torch.cat([a.blocks, b.blocks]), dim=0)
        if blocks.numel() != torch.unique(blocks).numel():
            raise LayoutError("the axis would carry two different bases")
        return _make(a.dims, a.sizes, blocks)

    def overlaps(self, other: Layout) -> bool:
        """Return whether some element belongs to both layouts, which need not be of one space."""
        if not set(self.dims) & set(other.dims):
            return False
        carriers = {**dict(zip(self.dims, self.sizes)), **dict(zip(other.dims, other.sizes))}
        a, b = self._widened(carriers).blocks.flatten(), other._widened(carriers).blocks.flatten()
        return bool(torch.isin(a, b).any())

    # -- applying a function to the vectors ---------------------------------------------------------------------------

    def apply(self, tensor: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Replace every vector of the space in ``tensor`` by ``function`` of it.

        ``function(x, dim)`` maps the vectors along axis ``dim`` (of length n) of ``x`` and keeps its shape.
        """
        if self.is_contiguous:
            dim = self.dims[0]
            if self.count == 1:
                return function(tensor, dim)
            return function(torch.unflatten(tensor, dim, (self.count, self.width)), dim + 1).flatten(dim, dim + 1)
        tail = tuple(range(-len(self.dims), 0))
        moved = tensor.movedim(self.dims, tail)
        flat = moved.reshape(*moved.shape[: moved.ndim - len(self.dims)], math.prod(self.sizes)).clone()
        blocks = self.blocks.to(flat.device)
        flat[..., blocks] = function(flat[..., blocks], -1)
        return flat.reshape(moved.shape).movedim(tail, self.dims)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _size(self, dim: int) -> int:
        return self.sizes[self.dims.index(dim)]

    def coordinate(self, dim: int) -> Tensor:
        """Return the position along axis ``dim`` of every element of every block, int64 (k, n)."""
        at = self.dims.index(dim)
        return (self.blocks // math.prod(self.sizes[at + 1 :])) % self.sizes[at]

    def _widened(self, carriers: Mapping[int, int]) -> Layout:
        """Return the same layout with the free axes among ``carriers`` (axis -> size) written out."""
        extra = {d: s for d, s in carriers.items() if d not in self.dims}
        if not extra:
            return self
        if 0 in extra.values():
            raise LayoutError("an empty selection")
        dims = tuple(sorted({*self.dims, *extra}))
        sizes = tuple(extra[d] if d in extra else self._size(d) for d in dims)
        repeats = math.prod(extra.values())
        grid = torch.arange(repeats, device="cpu")
        coordinates, stride = [], repeats
        for d in dims:
            if d in extra:
                stride //= extra[d]
                coordinates.append(((grid // stride) % extra[d]).view(-1, 1, 1).expand(repeats, self.count, self.width))
            else:
                coordinates.append(self.coordinate(d).unsqueeze(0).expand(repeats, self.count, self.width))
        return Layout(dims, sizes, _ravel(coordinates, sizes).reshape(-1, self.width))


def merged(layouts: Iterable[Layout]) -> Layout:
    """Return the layout of a tensor on which all of ``layouts`` hold.

    Raises:
        LayoutError: they contradict each other, or there are none.
    """
    result: Layout | None = None
    for layout in layouts:
        result = layout if result is None else result.joined(layout)
    if result is None:
        raise LayoutError("nothing carries the axis")
    return result


def _make(dims: tuple[int, ...], sizes: tuple[int, ...], blocks: Tensor) -> Layout:
    """Return the normal form: blocks are in the order of their first elements, and no axis is listed along which the
    layout just repeats.
    """
    for dim, size in zip(dims, sizes):
        stride = math.prod(sizes[dims.index(dim) + 1 :])
        position = (blocks // stride) % size
        if blocks.shape[0] % size or not _constant_rows(position):
            continue
        rest = (blocks // (stride * size)) * stride + blocks % stride
        order = torch.argsort(position[:, 0] * math.prod(sizes) + rest[:, 0])
        by_position = rest[order].view(size, -1, blocks.shape[1])
        if not torch.equal(
            torch.sort(position[:, 0]).values,
            torch.arange(size, device="cpu").repeat_interleave(blocks.shape[0] // size),
        ):
            continue
        if torch.equal(by_position, by_position[:1].expand_as(by_position)):
            at = dims.index(dim)
            return _make(dims[:at] + dims[at + 1 :], sizes[:at] + sizes[at + 1 :], by_position[0])
    return Layout(dims, sizes, blocks[torch.argsort(blocks[:, 0])])


def _constant_rows(values: Tensor) -> bool:
    return bool((values == values[:, :1]).all())


def _ravel(coordinates: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    flat = torch.zeros_like(coordinates[0])
    for coordinate, size in zip(coordinates, sizes):
        flat = flat * size + coordinate
    return flat


def _view_groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Split a view into the smallest runs of axes that hold the same elements.

    (4, 6, s) -> (24, s) is split into [0, 1] -> [0] and [2] -> [1].
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        group_in, group_out = [i], [j]
        left, right = before[i], after[j]
        while left != right:
            if _magnitude(left) <= _magnitude(right) and i + 1 < len(before):
                i += 1
                group_in.append(i)
                left = left * before[i]  # type: ignore[operator]
            elif j + 1 < len(after):
                j += 1
                group_out.append(j)
                right = right * after[j]  # type: ignore[operator]
            else:
                raise LayoutError(f"the view {tuple(before)} -> {tuple(after)} cannot be followed")
        groups.append((group_in, group_out))
        i, j = i + 1, j + 1
    tail_in, tail_out = list(range(i, len(before))), list(range(j, len(after)))
    if (tail_in or tail_out) and groups:
        groups[-1] = (groups[-1][0] + tail_in, groups[-1][1] + tail_out)
    return groups


_PRIMES = (1009, 2003, 4001, 8009, 16001, 32003, 64007, 128021)


def _magnitude(size: Size) -> float:
    """Return a number that orders sizes; dynamic ones count as distinct large primes."""
    if isinstance(size, int):
        return float(size)
    symbols = sorted(size.free_symbols, key=str)  # type: ignore[attr-defined]
    return float(size.subs({s: _PRIMES[k % len(_PRIMES)] for k, s in enumerate(symbols)}))  # type: ignore[attr-defined]

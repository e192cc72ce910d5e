"""The length of a cache, told by the mask:  Shape(past)[2]  ->  Shape(mask)[1] − Shape(ids)[1].

Then nothing but attention reads a cache, and it may be longer than what is in it: a runtime allocates it once, and the
kernel writes new keys and values into it, where else it copies the whole of it for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .attention import GQA
from .builder import Builder
from .match import integer, names, sizes

_LENGTH = 2  # the axis of a cache (batch, heads, length, size) that grows
_CACHES = (3, 4)  # inputs of the kernel


def free_caches(graph: ir.Graph, builder: Builder) -> bool:
    """Make the caches of ``graph`` independent of their length, in place.

    Returns whether they are: False, and nothing is changed, where something else than attention and lengths depends on
    them, or where no mask is as long as a cache and the new tokens together.
    """
    caches = [value for value in graph.inputs if len(sizes(value)) > 2]
    found = _told(graph, caches)
    readers = [use.node for cache in caches for use in cache.uses() if not _is_attention(use.node, use.idx)]
    if found is None or any(_lengths_of(node, found[2]) is None for node in readers):
        return False
    ids, mask, told = found
    for node in readers:
        axes = _lengths_of(node, told)
        assert axes is not None  # all of them were asked
        parts = [_size(builder.at(node), ids, mask, axis) for axis in axes]
        whole = ir.DataType.INT64
        made = parts[0] if len(parts) == 1 else builder.add("Concat", parts, shape=[len(parts)], dtype=whole, axis=0)
        ir.convenience.replace_all_uses_with(node.outputs[0], made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return bool(caches)


_Told = tuple[ir.Value, ir.Value, dict[object, str]]


def _told(graph: ir.Graph, caches: Sequence[ir.Value]) -> _Told | None:
    """Return the token ids, the mask, and what each size of a cache counts; None where not all of them are told."""
    pairs = [value for value in graph.inputs if len(sizes(value)) == 2 and value.dtype == ir.DataType.INT64]
    for ids in pairs:
        batch, new = names(sizes(ids))
        for mask in pairs:
            rows, seen = names(sizes(mask))
            grown = {str(names(sizes(cache))[_LENGTH]) for cache in caches}
            if len(grown) != 1 or rows != batch or not isinstance(batch, str) or mask is ids:
                continue
            (past,) = grown
            if seen in (f"{past} + {new}", f"{new} + {past}"):
                return ids, mask, {batch: "batch", past: "past"}
    return None


def _is_attention(node: ir.Node, index: int) -> bool:
    return node.op_type == GQA and index in _CACHES


def _lengths_of(node: ir.Node, told: dict[object, str]) -> list[int | str] | None:
    """Return the sizes that a Shape of a cache returns: numbers, ``batch`` and ``past``; None for another node."""
    if node.op_type != "Shape" or node.domain not in ("", "ai.onnx"):
        return None
    shape = names(sizes(node.inputs[0]))
    chosen = shape[integer(node, "start", 0) : integer(node, "end", len(shape))]
    found = [size if isinstance(size, int) else told.get(size) for size in chosen]
    return None if not found or None in found else [size for size in found if size is not None]


def _size(builder: Builder, ids: ir.Value, mask: ir.Value, size: int | str) -> ir.Value:
    """Return one size of a cache, int64 (1,)."""
    whole = ir.DataType.INT64
    if isinstance(size, int):
        return builder.integers(size)
    if size == "batch":
        return builder.add("Shape", [ids], shape=[1], dtype=whole, start=0, end=1)
    seen = builder.add("Shape", [mask], shape=[1], dtype=whole, start=1, end=2)
    new = builder.add("Shape", [ids], shape=[1], dtype=whole, start=1, end=2)
    return builder.add("Sub", [seen, new], shape=[1], dtype=whole)

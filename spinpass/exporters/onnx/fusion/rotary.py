"""Rotary position embeddings:  x·cos + rotate_half(x)·sin  ->  RotaryEmbedding, cosines computed as before.

    x · C + Concat(−x[h/2:], x[:h/2]) · S,  C = Unsqueeze(E(Concat(f, f)), 1)   ->   RotaryEmbedding(x, ids, E(f), E(f))

The kernel looks angles up by position in a table. Here the table is what the program computes for the tokens at hand,
one row for each of them, looked up by the token's number: there is no longest position, and whatever the program does
to its frequencies stays. All layers share one table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .builder import CONTRIB, Builder
from .match import constant, integer, made_by, names, number, sizes, static

ROTARY = "RotaryEmbedding"
_KERNELS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_ELEMENTWISE = ("Cos", "Sin", "Cast", "Mul")


def fuse_rotary(graph: ir.Graph, builder: Builder) -> int:
    """Replace the rotary embeddings of ``graph`` in place; return how many there were.

    Values of shape (batch, heads, tokens, size) stay in this layout.
    """
    tables = _Tables(builder)
    count = 0
    for node in list(graph):
        matched = _match(node)
        if matched is None:
            continue
        y = node.outputs[0]
        inputs = [matched.x, *tables.of(node, matched)]
        fused = builder.at(node).add(ROTARY, inputs, y, domain=CONTRIB, interleaved=0)
        ir.convenience.replace_all_uses_with(y, fused, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        count += 1
    return count


@dataclass(frozen=True)
class _Rotary:
    """This is a match: x (batch, heads, tokens, size) and the angles' cosines and sines (batch or 1, tokens, size)."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value


def _match(node: ir.Node) -> _Rotary | None:
    if node.op_type != "Add" or node.domain != "" or node.outputs[0].dtype not in _KERNELS:
        return None
    for straight, turned in (node.inputs, tuple(reversed(node.inputs))):
        for x, cos in _products(straight):
            for half, sin in _products(turned):
                tables = _angles(cos), _angles(sin)
                if tables[0] is not None and tables[1] is not None and _is_rotated_half(half, x):
                    return _Rotary(x, tables[0], tables[1])
    return None


def _products(value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """Return both readings of a product; nothing where it is none."""
    node = made_by(value, "Mul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return []
    a, b = node.inputs
    return [(a, b), (b, a)]  # type: ignore[list-item]


def _angles(value: ir.Value) -> ir.Value | None:
    """Return the value behind the axis for the heads, if both of its halves are the same."""
    node = made_by(value, "Unsqueeze")
    axes = None if node is None else constant(node.inputs[1])
    if node is None or axes is None or axes.tolist() not in ([1], [-3]) or len(sizes(node.inputs[0])) != 3:
        return None
    at = node.inputs[0]
    while (step := made_by(at, *_ELEMENTWISE)) is not None:
        if step.op_type == "Mul" and number(step.inputs[1]) is None:
            return None
        at = step.inputs[0]
    twice = made_by(at, "Concat")
    if twice is None or len(twice.inputs) != 2 or twice.inputs[0] is not twice.inputs[1]:
        return None
    return node.inputs[0] if integer(twice, "axis", 0) in (-1, 2) else None


def _is_rotated_half(value: ir.Value, x: ir.Value) -> bool:
    """Say whether ``value`` is Concat(−x[size/2:], x[:size/2]) along the last axis."""
    size, joined = static(x, -1), made_by(value, "Concat")
    if size is None or joined is None or len(sizes(x)) != 4 or len(joined.inputs) != 2:
        return False
    negated = made_by(joined.inputs[0], "Neg")
    if negated is None or integer(joined, "axis", 0) not in (-1, 3):
        return False
    return _is_part(negated.inputs[0], x, size // 2, size) and _is_part(joined.inputs[1], x, 0, size // 2)


def _is_part(value: ir.Value | None, x: ir.Value, start: int, stop: int) -> bool:
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return False
    begin, end, axis, step = ([int(number(v) or 0)] for v in (*node.inputs[1:4], *(node.inputs[4:5] or [None])))
    if any(number(v) is None for v in node.inputs[1:4]) or axis[0] not in (-1, 3) or step[0] not in (0, 1):
        return False
    return begin[0] == start and (end[0] == stop or (stop == static(x, -1) and end[0] > stop))


@dataclass
class _Tables:
    """These are positions and tables for the kernel, made once for all layers that share their angles."""

    builder: Builder
    made: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)

    def of(self, node: ir.Node, rotary: _Rotary) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return position ids, cosines and sines."""
        self.builder.at(node)
        return self._ids(rotary), self._table(rotary.cos), self._table(rotary.sin)

    def _table(self, angles: ir.Value) -> ir.Value:
        """Return the first half of (batch or 1, tokens, size), as (batch · tokens, size/2)."""
        key = angles, "table"
        if key not in self.made:
            half = (static(angles, -1) or 0) // 2
            ends = [self.builder.integers(v) for v in (0, half, -1)]
            part = self.builder.add("Slice", [angles, *ends], angles, shape=[*sizes(angles)[:-1], half])
            self.made[key] = self.builder.reshape(part, [-1, half], [None, half])
        return self.made[key]

    def _ids(self, rotary: _Rotary) -> ir.Value:
        """Return the number of every token (batch, tokens); a single 0 where all rows have the same positions."""
        if static(rotary.cos, 0) == 1 and names(sizes(rotary.x))[0] != 1:
            return self.builder.integers(0)
        key = rotary.cos, "ids"
        if key not in self.made:
            b, dims = self.builder, list(sizes(rotary.cos)[:2])
            shape = b.add("Shape", [rotary.cos], shape=[2], dtype=ir.DataType.INT64, start=0, end=2)
            whole = b.add("ReduceProd", [shape], shape=[], dtype=ir.DataType.INT64, keepdims=0)
            zero, one = (b.constant(np.array(v, np.int64)) for v in (0, 1))
            numbers = b.add("Range", [zero, whole, one], shape=[None], dtype=ir.DataType.INT64)
            self.made[key] = b.add("Reshape", [numbers, shape], shape=dims, dtype=ir.DataType.INT64)
        return self.made[key]

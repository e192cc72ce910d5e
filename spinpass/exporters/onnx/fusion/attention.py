"""Attention with a KV cache  ->  GroupQueryAttention, for prompts and single tokens alike.

    softmax(s · q Concat(past, k)ᵀ + mask) Concat(past, v)   ->   GroupQueryAttention(q, k, v, past, past, lengths)

The kernel takes tokens first, (batch, tokens, heads·size), which is how the linear layers make them: the transposes in
front and behind go. Hadamards, roundings and norms of single heads stay where they are, in that layout. The kernel is
causal by itself; a mask that says more is added as it is (``attention_bias``), so that padding on either side counts as
in the program. There −∞ becomes a large number: a token of padding that sees nothing would otherwise be no number, and
that in the cache makes everything none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ..operators.hadamard import DOMAIN, is_hadamard
from .attention_pattern import CachedAttention, NoMatchError, match_attention
from .builder import CONTRIB, Builder
from .mask import Mask, read_mask
from .match import integers, made_by, names, only_user, sizes, static
from .norm import NORM
from .rotary import ROTARY

GQA = "GroupQueryAttention"
_KERNELS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SIZE_STEP = 8  # the kernel's heads are multiples of this
_TOKENS_FIRST = [0, 2, 1, 3]
_CLOSED = {ir.DataType.FLOAT: np.float32(-1e30), ir.DataType.FLOAT16: np.float16(-3e4)}  # far below every score


def fuse_attention(model: ir.Model, builder: Builder) -> tuple[int, tuple[str, ...]]:
    """Replace the attention of ``model`` in place; return how many there were, and why every other Softmax stays.

    That of a router is no attention and is not spoken of.
    """
    fusing = _Fusing(model, builder)
    kept = []
    for node in [n for n in model.graph if n.op_type == "Softmax" and n.domain == "" and not _is_routing(n)]:
        try:
            fusing.fuse(node)
        except NoMatchError as error:
            kept.append(f"{node.outputs[0].name}: {error}")
    model.graph.sort()
    return fusing.count, tuple(kept)


def _is_routing(softmax: ir.Node) -> bool:
    """Say whether a Softmax is of (tokens, experts), which no attention is."""
    shape = softmax.outputs[0].shape
    return shape is not None and len(shape) == 2


@dataclass
class _Fusing:
    """This is one pass over a graph, and what its layers share."""

    model: ir.Model
    builder: Builder
    count: int = 0
    masks: dict[ir.Value, Mask | str] = field(default_factory=dict)
    biases: dict[ir.Value, ir.Value] = field(default_factory=dict)
    lengths: dict[str, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def fuse(self, softmax: ir.Node) -> None:
        """Replace the attention around a Softmax. Raises NoMatchError; the graph is then as it was."""
        found = match_attention(softmax)
        mask = self._check(found)
        q, k, v = (flat(self.builder.at(softmax), x) for x in (found.query, found.key.new, found.value.new))
        last, total = self._lengths(found.key.past, q)
        heads, kv_heads = static(found.query, 1), static(found.key.new, 1)
        extra = [None, None, None, self._finite(found.bias)] if mask.needed and found.bias is not None else []
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": found.scale}
        if found.cap:
            attributes["softcap"] = found.cap
        if mask.window is not None:
            attributes["local_window_size"] = mask.window
        y, key, value = self.builder.node(
            GQA,
            [q, k, v, found.key.past, found.value.past, last, total, *extra],
            [(q, None, None), (found.key.present, None, None), (found.value.present, None, None)],
            domain=CONTRIB,
            attributes=attributes,
        )
        present = [found.key.present, found.value.present]
        ir.convenience.replace_all_uses_with(present, [key, value], replace_graph_outputs=True)
        self._replace_result(found.weighted, y)
        self.count += 1

    def _check(self, found: CachedAttention) -> Mask:
        """Return what the kernel needs to know of the mask. Raises NoMatchError for what it does not compute."""
        q = found.query
        if q.dtype not in _KERNELS:
            raise NoMatchError(f"GroupQueryAttention has no kernel for {q.dtype}")
        size = static(q, -1) or 0
        if size % _SIZE_STEP:
            raise NoMatchError(f"its heads are of size {size}, and GroupQueryAttention takes multiples of {_SIZE_STEP}")
        if not found.scale > 0:
            raise NoMatchError(f"its scale {found.scale} is not positive")
        batch, _, tokens, _ = names(sizes(q))
        past = str(names(sizes(found.key.past))[2])
        if found.bias is None:
            if tokens == 1:
                return Mask(None, needed=False)
            raise NoMatchError("it has no mask: a token sees later ones")
        if len(sizes(found.bias)) != 4 or not isinstance(tokens, str) or batch is None:
            raise NoMatchError("its mask is not of the shape (batch, heads, tokens, keys)")
        if found.bias not in self.masks:
            opsets = dict(self.model.opset_imports)
            self.masks[found.bias] = read_mask(found.bias, self.model.graph, opsets, tokens, past, batch)
        mask = self.masks[found.bias]
        if isinstance(mask, str):
            raise NoMatchError(mask)
        return mask

    def _finite(self, bias: ir.Value) -> ir.Value:
        """Return ``bias`` without −∞, made once for all layers that share it."""
        if bias not in self.biases:
            assert bias.dtype is not None  # that of the scores
            closed = self.builder.constant(np.array(_CLOSED[bias.dtype]))
            self.biases[bias] = self.builder.add("Max", [bias, closed], bias)
        return self.biases[bias]

    def _lengths(self, past: ir.Value, q: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the keys of each row of the batch less one, (batch,), and the keys, (), both int32.

        ``q`` is (batch, tokens, ...).
        """
        key = str(names(sizes(past))[2])
        if key not in self.lengths:
            b, whole = self.builder, ir.DataType.INT64
            seen = b.add("Shape", [past], shape=[1], dtype=whole, start=2, end=3)
            new = b.add("Shape", [q], shape=[1], dtype=whole, start=1, end=2)
            batch = b.add("Shape", [past], shape=[1], dtype=whole, start=0, end=1)
            keys = b.add("Add", [seen, new], shape=[1], dtype=whole)
            last = b.add("Sub", [keys, b.integers(1)], shape=[1], dtype=whole)
            rows = b.add("Expand", [last, batch], shape=[sizes(past)[0]], dtype=whole)
            small = ir.DataType.INT32
            total = b.add("Squeeze", [keys], shape=[], dtype=whole)
            self.lengths[key] = (
                b.add("Cast", [rows], rows, dtype=small, to=small.value),
                b.add("Cast", [total], total, dtype=small, to=small.value),
            )
        return self.lengths[key]

    def _replace_result(self, weighted: ir.Value, y: ir.Value) -> None:
        """Put ``y`` (batch, tokens, heads·size) in place of (batch, heads, tokens, size) and of what flattens that."""
        turned = only_user(weighted, "Transpose")
        flattened = None if turned is None else only_user(turned.outputs[0], "Reshape")
        if turned is not None and flattened is not None and integers(turned, "perm") == _TOKENS_FIRST:
            result = flattened.outputs[0]
            if len(sizes(result)) == 3 and static(result, -1) == static(y, -1):
                ir.convenience.replace_all_uses_with(result, y, replace_graph_outputs=True)
                return
        batch, heads, tokens, size = sizes(weighted)
        parted = self.builder.reshape(y, [0, 0, heads, size], [batch, tokens, heads, size])  # type: ignore[list-item]
        back = self.builder.add("Transpose", [parted], weighted, perm=_TOKENS_FIRST)
        ir.convenience.replace_all_uses_with(weighted, back, replace_graph_outputs=True)


# -- tokens first -----------------------------------------------------------------------------------------------------


def flat(builder: Builder, x: ir.Value) -> ir.Value:
    """Return ``x`` (batch, heads, tokens, size) as (batch, tokens, heads·size), made anew from what it was made of."""
    for rebuild in (_untransposed, _hadamard, _rotary, _per_head):
        made = rebuild(builder, x)
        if made is not None:
            return made
    batch, heads, tokens, size = sizes(x)
    turned = builder.add("Transpose", [x], x, shape=[batch, tokens, heads, size], perm=_TOKENS_FIRST)
    return _merged(builder, turned)


def _untransposed(builder: Builder, x: ir.Value) -> ir.Value | None:
    node = made_by(x, "Transpose")
    if node is None or integers(node, "perm") != _TOKENS_FIRST or node.inputs[0] is None:
        return None
    tokens_first = node.inputs[0]
    split = made_by(tokens_first, "Reshape")
    whole = None if split is None else split.inputs[0]
    if whole is not None and len(sizes(whole)) == 3 and static(whole, -1) == _width(x):
        return whole
    return _merged(builder, tokens_first)


def _hadamard(builder: Builder, x: ir.Value) -> ir.Value | None:
    """Move a Hadamard, which runs over blocks of the last axis: heads side by side are more of them."""
    node = x.producer()
    if node is None or not is_hadamard(node) or node.inputs[0] is None:
        return None
    inner = flat(builder, node.inputs[0])
    return builder.add(node.op_type, [inner], inner, domain=node.domain, **_attributes(node))


def _rotary(builder: Builder, x: ir.Value) -> ir.Value | None:
    node = made_by(x, ROTARY, domain=CONTRIB)
    if node is None or node.inputs[0] is None:
        return None
    inner = flat(builder, node.inputs[0])
    return builder.add(ROTARY, [inner, *node.inputs[1:]], inner, domain=CONTRIB, **_attributes(node))


def _per_head(builder: Builder, x: ir.Value) -> ir.Value | None:
    """Move roundings and norms of each head's vector, between two Reshapes."""
    node = x.producer()
    if node is None or not (node.domain == DOMAIN or node.op_type == NORM) or len(sizes(x)) != 4:
        return None
    assert node.inputs[0] is not None
    batch, heads, tokens, size = sizes(x)
    inner = flat(builder, node.inputs[0])
    parted = builder.reshape(inner, [0, 0, heads, size], [batch, tokens, heads, size])  # type: ignore[list-item]
    return _merged(
        builder, builder.add(node.op_type, [parted, *node.inputs[1:]], parted, domain=node.domain, **_attributes(node))
    )


def _merged(builder: Builder, x: ir.Value) -> ir.Value:
    """(batch, tokens, heads, size) -> (batch, tokens, heads·size)"""
    batch, tokens, heads, size = sizes(x)
    assert isinstance(heads, int) and isinstance(size, int)  # by match_attention
    return builder.reshape(x, [0, 0, heads * size], [batch, tokens, heads * size])


def _width(x: ir.Value) -> int:
    return math.prod(size for size in (sizes(x)[1], sizes(x)[3]) if isinstance(size, int))


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}

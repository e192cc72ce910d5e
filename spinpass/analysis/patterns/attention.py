"""Attention as the graph spells it: one operator, or scores -> softmax -> weighted sum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from spinpass.graph import Layout, ProgramEditor, arguments, is_op, op_name, shape, value

from ..ops.rules import Label, Movement, Multilinear, Operand
from ..ops.table import rule_of
from .linear import as_linear

_FUSED = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
)
SOFTMAX = ("aten::softmax", "aten::_softmax", "aten::_safe_softmax")
"""The operators that compute a softmax."""

_TOWARDS_SCORES = (
    "aten::mul",
    "aten::div",
    "aten::add",
    "aten::sub",
    "aten::tanh",
    "aten::where",
    "aten::masked_fill",
    "aten::cat",
    "aten::clamp",
    "aten::amax",
    "aten::max",
    "aten::baddbmm",
)


@dataclass(frozen=True)
class Attention:
    """One attention, softmax(q kᵀ) v.

    Attributes:
        node: the attention operator, or the softmax where attention is spelled out.
        query: q.
        query_layout: the axis along which q is contracted with k.
        key: k.
        key_layout: the axis along which k is contracted with q: not the last one where kᵀ is an operand.
        value: v.
        value_layout: the axis of v that passes to the result.
    """

    node: Node
    query: Node
    query_layout: Layout
    key: Node
    key_layout: Layout
    value: Node
    value_layout: Layout


def find_attention(editor: ProgramEditor) -> list[Attention]:
    """Return every softmax(q kᵀ) v of the program, in the order of the graph."""
    found = []
    for node in editor.nodes:
        if not is_op(node):
            continue
        match = (
            _fused(node)
            if op_name(node) in _FUSED
            else _spelled_out(editor, node)
            if op_name(node) in SOFTMAX
            else None
        )
        if match is not None:
            found.append(match)
    return found


def _fused(node: Node) -> Attention | None:
    args = arguments(node)
    query, value = args["query"], args["value"]
    q_size, v_size = shape(query)[-1], shape(value)[-1]
    if not isinstance(q_size, int) or not isinstance(v_size, int):
        return None
    return Attention(
        node,
        query,
        Layout.full(len(shape(query)) - 1, q_size),
        args["key"],
        Layout.full(len(shape(args["key"])) - 1, q_size),
        value,
        Layout.full(len(shape(value)) - 1, v_size),
    )


def _spelled_out(editor: ProgramEditor, softmax: Node) -> Attention | None:
    scores, weighted = _scores(editor, softmax), _weighted_sum(editor, softmax)
    if scores is None or weighted is None:
        return None
    (query, key), (value, weights) = scores.operands, weighted.operands
    contracted = [
        _static(one, set(other.labels) - set(scores.out)) for one, other in ((query, key), (key, query))
    ]
    passed = _static(value, set(weighted.out) - set(weights.labels))
    if not all(contracted) or not passed:
        return None
    of_query, of_key = (layouts[0] for layouts in contracted)
    return Attention(softmax, query.node, of_query, key.node, of_key, value.node, passed[-1])


def _static(operand: Operand, names: Collection[Label | None]) -> list[Layout]:
    """Return the axes with one of these labels, where their size is known."""
    sizes = shape(operand.node)
    named = [d for d, label in enumerate(operand.labels) if label is not None and label in names]
    return [Layout.full(d, size) for d in named if isinstance(size := sizes[d], int)]


@dataclass(frozen=True)
class _Product:
    """A product of two computed values, and the labels of its result."""

    operands: tuple[Operand, Operand]
    out: tuple[Label | None, ...]


def _scores(editor: ProgramEditor, softmax: Node) -> _Product | None:
    """Return the product of two computed values that the softmax is taken of, masks, scales and caps looked through."""
    todo, seen = [softmax.args[0]], set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen or node.op != "call_function" or editor.is_constant(node):
            continue
        seen.add(node)
        product = _activations_product(editor, node)
        if product is not None:
            return product
        rule = rule_of(node)
        if isinstance(rule, Movement):
            todo.append(rule.source)
        elif op_name(node) in _TOWARDS_SCORES or op_name(node) == "getitem":
            todo += [
                a for a in node.all_input_nodes if len(shape(a)) == len(shape(node)) or op_name(a) in _TOWARDS_SCORES
            ]
    return None


def _weighted_sum(editor: ProgramEditor, softmax: Node) -> _Product | None:
    """Return the product that the softmax goes into: first the values that it weighs, then what came of it."""
    todo, seen = [softmax], set()
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            product = _activations_product(editor, user)
            if product is not None:
                a, b = product.operands
                return product if b.node is node else replace(product, operands=(b, a))
            if isinstance(rule_of(user), Movement) or op_name(user) in (
                "aten::mul",
                "aten::where",
                "aten::masked_fill",
            ):
                todo.append(user)
    return None


def _activations_product(editor: ProgramEditor, node: Node) -> _Product | None:
    """Return the node as a product of two computed values, or None."""
    if op_name(node) not in ("aten::matmul", "aten::bmm", "aten::mm", "aten::baddbmm", "aten::einsum"):
        return None
    rule = rule_of(node)
    if not isinstance(rule, Multilinear) or len(rule.terms[-1]) != 2:
        return None
    a, b = rule.terms[-1]
    if editor.is_constant(a.node) or editor.is_constant(b.node):
        return None
    return _Product((a, b), rule.out)


def cache_values(editor: ProgramEditor, operand: Node) -> set[Node]:
    """Return what a KV cache may hold of an attention's key or value operand.

    That is everything between the linear layer and the attention; of what only gives a size, nothing.
    """
    found: set[Node] = set()
    todo = [operand]
    while todo:
        node = todo.pop()
        if node in found or editor.is_constant(node) or not isinstance(value(node), Tensor):
            continue
        found.add(node)
        if node.op == "call_function" and as_linear(editor, node) is None and not _mixes_tokens(editor, node):
            todo += node.all_input_nodes
    return found


def _mixes_tokens(editor: ProgramEditor, node: Node) -> bool:
    return is_op(node) and (op_name(node) in _FUSED or _activations_product(editor, node) is not None)

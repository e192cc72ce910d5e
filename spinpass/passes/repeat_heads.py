"""``attention(q, k, v, enable_gqa)  ->  attention(q, repeat(k), repeat(v))``, for runtimes that repeat no heads.

    repeat(k)[g·r + i]  =  k[g],  i < r:  the r query heads of a group read one key head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass import record
from spinpass.errors import ExportError
from spinpass.graph import ProgramEditor, arguments, op_name, shape

from .lower_hadamards import put_in_place

_ATTENTION = "aten::scaled_dot_product_attention"
_HEADS = -3  # the axis of the heads


def repeat_heads(program: ExportedProgram) -> ExportedProgram:
    """Return a program in which every attention has as many heads of keys and values as of queries.

    It computes what ``program`` does. Dynamic shapes and the record (:mod:`spinpass.record`) are kept. The program
    given is not changed, and it is what is returned where no attention groups its queries.

    Raises:
        ProgramError, QuantizedWeightError: as :class:`spinpass.graph.editor.ProgramEditor`.
        ExportError: a number of heads is dynamic.
    """
    if not any(_groups_queries(node) for node in program.graph.nodes):
        return program
    editor = ProgramEditor(program)
    for node in [n for n in editor.nodes if _groups_queries(n)]:
        put_in_place(editor, node, _ungrouped(editor, node))
    found = record.read(program)
    if found is not None:
        record.write(editor.graph, found)
    return editor.finish()


def _groups_queries(node: Node) -> bool:
    return op_name(node) == _ATTENTION and bool(arguments(node)["enable_gqa"])


def _ungrouped(editor: ProgramEditor, node: Node) -> Node:
    """Return an attention like ``node`` that is given every head of keys and values as often as it is read."""
    at = node.prev

    def add(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        nonlocal at
        at = editor.call(target, *args, after=at, origin=node.name, **kwargs)
        return at

    def repeated(heads: Node) -> Node:
        query, own = shape(given["query"])[_HEADS], shape(heads)[_HEADS]
        if not (isinstance(query, int) and isinstance(own, int)):
            raise ExportError(f"{node.name}: {query} query heads read {own} heads of keys: make both numbers static")
        if query == own:
            return heads
        each = [-1] * (len(shape(heads)) + 1)
        each[_HEADS] = query // own
        one = add(torch.ops.aten.unsqueeze.default, heads, _HEADS)
        add(torch.ops.aten.expand.default, one, each)
        return add(torch.ops.aten.flatten.using_ints, at, _HEADS - 1, _HEADS)

    given = arguments(node)
    operands = given["query"], repeated(given["key"]), repeated(given["value"])
    options = {name: given[name] for name in ("attn_mask", "dropout_p", "is_causal", "scale")}
    return add(torch.ops.aten.scaled_dot_product_attention.default, *operands, **options)

"""Which inputs and outputs of a program are its KV cache, found at the attention; and a name for each.

An output that is an input with something written or joined to it is a cache. It holds keys where an attention's key
operand is made of it, values where the value operand is, and is another state of the model where neither is. Which
layer it belongs to only labels it: the number in the path of the module that reads it, or its place in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from spinpass.analysis import cache_values, find_attention
from spinpass.execution import continued_inputs, user_input_names
from spinpass.graph import ProgramEditor, shape
from spinpass.passes import open_program

_RETURNED = OutputKind.USER_OUTPUT
_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class CacheTensor:
    """This is one tensor that goes from call to call.

    ``input`` is the name of its placeholder, ``output`` its index among the user outputs. ``role`` is ``key``,
    ``value``, or ``state`` for anything else.
    """

    input: str
    output: int
    layer: int
    role: str

    @property
    def label(self) -> str:
        """Return layer and role as the names of files have them, for example ``3.key``."""
        return f"{self.layer}.{self.role}"


def find_caches(ep: ExportedProgram) -> list[CacheTensor]:
    """Return the cache of a program in the order of its inputs; nothing where it has none. No two have one label."""
    pairs = continued_inputs(ep)
    if not pairs:
        return []
    editor = open_program(ep)
    placeholders = {node.name: node for node in editor.graph.nodes if node.op == "placeholder"}
    returned = {editor.user_output_index(i): node for i, kind, _, node in editor.output_values() if kind is _RETURNED}
    roles = {
        name: role
        for name, role in _roles(editor).items()
        if name in pairs and _has_tokens(placeholders.get(name), returned.get(pairs[name]))
    }
    found = [
        CacheTensor(name, pairs[name], _layer(placeholders.get(name)), roles.get(name, "state"))
        for name in user_input_names(ep)
        if name in pairs
    ]
    if -1 in {tensor.layer for tensor in found} or _repeated([t.label for t in found if t.role != "state"]):
        found = list(_in_order(found))
    return list(_distinct(found))


def _roles(editor: ProgramEditor) -> dict[str, str]:
    """Return {placeholder: "key" or "value"} by the operand of an attention that it is part of."""
    roles: dict[str, str] = {}
    for attention in find_attention(editor):
        for role, operand in (("key", attention.key), ("value", attention.value)):
            for node in cache_values(editor, operand):
                if node.op == "placeholder":
                    roles.setdefault(node.name, role)
    return roles


def _has_tokens(given: Node | None, returned: Node | None) -> bool:
    """Say whether an axis may count tokens: what keys are made of may also be the last tokens of a convolution, whose
    state has three axes at most and does not grow."""
    before, after = ([] if node is None else shape(node) for node in (given, returned))
    return len(before) > 3 or str(before) != str(after)


def _layer(node: Node | None) -> int:
    """Return the number in the path of the module that reads a placeholder; −1 where there is none."""
    for user in () if node is None else node.users:
        stack = user.meta.get("nn_module_stack") or {}
        paths = [entry[0] for entry in stack.values()]
        numbers = _NUMBER.findall(paths[-1]) if paths else []
        if numbers:
            return int(numbers[0])
    return -1


def _in_order(found: list[CacheTensor]) -> Iterator[CacheTensor]:
    """Yield the tensors with layers counted: the next one begins where a role comes again."""
    layer, seen = 0, set[str]()
    for tensor in found:
        if tensor.role in seen and tensor.role != "state":
            layer, seen = layer + 1, set()
        seen.add(tensor.role)
        yield replace(tensor, layer=layer)


def _distinct(found: list[CacheTensor]) -> Iterator[CacheTensor]:
    """Yield the tensors; states of one layer are numbered where there are several."""
    labels = [tensor.label for tensor in found]
    for i, tensor in enumerate(found):
        number = labels[:i].count(tensor.label)
        yield replace(tensor, role=f"{tensor.role}.{number}") if labels.count(tensor.label) > 1 else tensor


def _repeated(labels: list[str]) -> bool:
    return len(set(labels)) < len(labels)

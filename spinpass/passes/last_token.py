"""LastToken:  (f(x) W)[:, last]  ->  f(x[:, last]) W:  the head works on a prompt's last token alone.

Generation reads no other logits. Those of a long prompt are a good part of what a small model computes, and gigabytes
for a large vocabulary. What lies between the logits and the first linear layer in front of them must act on each token
by itself. Where the program takes an attention mask, the last token of a row is the last that is no padding.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass import record
from spinpass.errors import ConfigError
from spinpass.execution import InputRole, user_inputs
from spinpass.graph import ProgramEditor, arguments, op_name, shape

_TOKENS = 1  # the axis of the tokens
_PER_TOKEN = frozenset({
    "aten::to", "aten::_to_copy", "aten::tanh", "aten::clone", "aten::contiguous", "aten::linear", "aten::mul",
    "aten::div", "aten::add", "aten::sub", "spinpass::hadamard", "spinpass::round_tokens",
})  # fmt: skip
_IN_FRONT = frozenset({
    "spinpass::hadamard", "spinpass::round_tokens", "spinpass::round_tensor", "spinpass::round_rows",
})  # fmt: skip
"""What belongs to a linear layer and stands in front of it: an exporter knows the two only side by side."""
_ORIGIN = "last token"


def last_token(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose first output is the last token's logits, (batch, 1, vocabulary).

    The record (:mod:`spinpass.record`) is kept, and the program given is not changed.

    Raises:
        ConfigError: the first output does not come out of a linear layer token by token.
        ProgramError, QuantizedWeightError: as :class:`spinpass.graph.editor.ProgramEditor`.
    """
    editor = ProgramEditor(program)
    logits = next((node for _, _, _, node in editor.output_values()), None)
    if logits is None or len(shape(logits)) != 3:
        raise ConfigError("the program's first output is no tensor of logits, (batch, tokens, vocabulary)")
    tail = _tail(editor, logits)
    source = _source(editor, tail[0])
    instead = {source: _last(editor, source, _mask(program, editor))}
    for node in tail:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: instead.get(n, n))
        instead[node] = editor.call(node.target, *args, after=node, origin=_ORIGIN, **kwargs)  # type: ignore[arg-type]
    if shape(instead[logits])[_TOKENS] != 1:
        raise ConfigError("the logits are added to something for every token: export the logits of all tokens")
    editor.output_node.replace_input_with(logits, instead[logits])
    found = record.read(program)
    if found is not None:
        record.write(editor.graph, found)
    return editor.finish()


def _last(editor: ProgramEditor, source: Node, mask: Node | None) -> Node:
    """Return the last token of every row of (batch, tokens, channels), (batch, 1, channels).

    The mask (batch, past + tokens) counts the tokens of a row, and the count is largest at the last one.
    """
    aten = torch.ops.aten

    def add(after: Node, target: Any, *args: Any) -> Node:
        return editor.call(target, *args, after=after, origin=_ORIGIN)

    if mask is None:
        one = add(source, aten.select.int, source, _TOKENS, -1)
        return add(one, aten.unsqueeze.default, one, _TOKENS)
    count = add(source, aten.cumsum.default, mask, 1)
    seen = add(count, aten.mul.Tensor, count, mask)
    place = add(seen, aten.argmax.default, seen, 1, True)  # in past + tokens
    whole = add(place, aten.sym_size.int, mask, 1)
    new = add(whole, aten.sym_size.int, source, _TOKENS)
    past = add(new, operator.sub, whole, new)
    at = add(past, aten.sub.Tensor, place, past)
    kept = add(at, aten.clamp.default, at, 0)  # a row may have no token among the new ones
    rows = add(kept, aten.unsqueeze.default, kept, -1)
    index = add(rows, aten.expand.default, rows, [-1, -1, shape(source)[-1]])
    return add(index, aten.gather.default, source, _TOKENS, index)


def _mask(program: ExportedProgram, editor: ProgramEditor) -> Node | None:
    """Return the input that says which tokens are padding; None where there is none."""
    found = [spec.name for spec in user_inputs(program) if spec.role is InputRole.MASK and len(spec.shape) == 2]
    return next((node for node in editor.nodes if node.name in found), None) if len(found) == 1 else None


def _tail(editor: ProgramEditor, logits: Node) -> list[Node]:
    """Return the nodes from the linear layer that is met first on the way back, with what belongs to it in front, to
    the logits, in this order.

    Raises:
        ConfigError: some node between them is not known to act on each token alone.
    """
    tail, reached = [logits], False
    while True:
        node = tail[-1]
        if op_name(node) not in (_PER_TOKEN | _IN_FRONT) and not _keeps_all(node):
            raise ConfigError(
                f"the logits come out of {op_name(node)} ({node.name}), which is not known to act on each token alone: "
                "export the logits of all tokens"
            )
        source = _source(editor, node)
        reached = reached or op_name(node) == "aten::linear"
        if reached and op_name(source) not in _IN_FRONT:
            return tail[::-1]
        tail.append(source)


def _source(editor: ProgramEditor, node: Node) -> Node:
    """Return the one operand that depends on the tokens, (batch, tokens, channels).

    Raises:
        ConfigError: there are several such operands, or it has another number of axes.
    """
    sources = [n for n in node.all_input_nodes if not editor.is_constant(n)]
    if len(sources) != 1 or len(shape(sources[0])) != 3:
        raise ConfigError(f"the logits depend on several values in {node.name}: export the logits of all tokens")
    return sources[0]


def _keeps_all(node: Node) -> bool:
    """Return whether the node is a slice that leaves out nothing, as in models that may be asked for some logits."""
    if op_name(node) != "aten::slice":
        return False
    given = arguments(node)
    return given["start"] in (None, 0) and given["step"] == 1 and shape(node) == shape(given["self"])

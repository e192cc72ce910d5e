"""What a space is called: its name comes from its parameters, so that every program of a model names it alike."""

from __future__ import annotations

import os

from torch.fx import Node

from spinpass.analysis import Attention, Space, as_linear
from spinpass.config import Role
from spinpass.graph import ProgramEditor


def parameter_names(editor: ProgramEditor, nodes: list[Node]) -> list[str]:
    """Return the names of the stored parameters that the nodes are computed from, sorted, each once."""
    return sorted({editor.fqn(leaf(editor, n)) for n in nodes})


def common_name(role: Role, space: Space, writers: list[str], readers: list[str]) -> str:
    """Return the module that the parameters of a space belong to; ``residual`` for a stream that is written into."""
    if role == "R1" and writers:
        return "residual"
    across_weights = writers + readers if role in ("R2", "R3") else readers
    return _common_prefix(across_weights) or space.seed.name


def attention_name(editor: ProgramEditor, attention: Attention) -> str:
    """Return the module whose parameters compute the queries, which has one name in every program of the model."""
    found: list[str] = []
    todo, seen = [attention.query], set()
    while todo:
        node = todo.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        linear = as_linear(editor, node)
        if linear is not None:
            found.append(editor.fqn(leaf(editor, linear.weight)))
        else:
            todo += [n for n in node.all_input_nodes if not editor.is_constant(n)]
    return _common_prefix([os.path.splitext(found[0])[0].rsplit(".", 1)[0] + "."]) if found else attention.node.name


def leaf(editor: ProgramEditor, node: Node) -> Node:
    """Return the stored constant that an expression of constants begins with."""
    while not editor.is_stored(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _common_prefix(names: list[str]) -> str:
    """Return the innermost module that all the parameters belong to; it may be an empty string."""
    paths = [n.split(".")[:-1] for n in names]
    prefix: list[str] = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)

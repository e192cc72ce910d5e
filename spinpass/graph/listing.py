"""A program under edit as text: a line for every constant and the steps queued on it, then a line for every node."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.fx import Node

from .editor import ProgramEditor
from .nodes import value


def listing(editor: ProgramEditor) -> str:
    """Return the program as text for people to read and for ``diff`` to compare."""
    steps = Counter(editor.queued())
    stored = filter(editor.is_stored, editor.nodes)
    lines = [f"constant {n.name}  {editor.fqn(n)}: {_shown(value(n))}{_queue(steps[n])}" for n in stored]
    for node in editor.nodes:
        given = [*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())]
        origin = node.meta.get("custom", {}).get("spinpass_origin", "")
        made = f"  # {origin}" if origin else ""
        lines.append(f"{node.name} = {node.target}({', '.join(given)}): {_shown(value(node))}{made}")
    return "\n".join(lines) + "\n"


def _queue(count: int) -> str:
    return f", {count} step{'s' * (count != 1)} queued" if count else ""


def _argument(argument: Any) -> str:
    if isinstance(argument, Node):
        return argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_argument, argument))}]"
    return str(argument)


def _shown(val: Any) -> str:
    if isinstance(val, Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    return f"({', '.join(map(_shown, val))})" if isinstance(val, (list, tuple)) else str(val)

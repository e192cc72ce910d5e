"""A file with the logits of a prompt's last token, read as one with those of every token:  f(x[:, last])  ->  f(x).

:func:`spinpass.passes.last_token` picks the last token of each row in front of the head. Scoring a text needs the
others as well, so the copy, which is in memory alone, leaves that one step out.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from spinpass.errors import ExportError

_TOKENS = 1  # the axis of the tokens


def every_token_model(path: Path, logits: str) -> bytes:
    """Return the model of a file without the step that picks a token.

    Args:
        path: of the file, whose external data stay where they are.
        logits: the name of its output with the logits of one token, (batch, 1, vocabulary).

    Raises:
        ExportError: there is no such step, or the package onnx is missing.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ExportError(f"scoring {path} needs {error.name}: pip install 'spinpass[onnx]'") from error
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    picked, source = _pick({name: node for node in graph.node for name in node.output}, logits, path)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == picked:
                node.input[index] = source
    del graph.value_info[:]  # they are of one token
    output = next(each for each in graph.output if each.name == logits)
    output.type.tensor_type.shape.dim[_TOKENS].dim_param = "every_token"
    return bytes(model.SerializeToString())


def _pick(made: dict[str, Any], logits: str, path: Path) -> tuple[str, str]:
    """Return what is picked and what from, of the step that is nearest to the logits. Raises ExportError."""
    waiting, seen = deque([logits]), {logits}
    while waiting:
        name = waiting.popleft()
        node = made.get(name)
        if node is None:
            continue
        if node.op_type == "GatherElements" and _axis(node) == _TOKENS:
            return name, node.input[0]
        before = made.get(node.input[0]) if node.op_type == "Unsqueeze" else None
        if before is not None and before.op_type == "Gather" and _axis(before) == _TOKENS:
            return name, before.input[0]
        for each in node.input:
            if each and each not in seen:
                seen.add(each)
                waiting.append(each)
    raise ExportError(
        f"{path} returns the logits of the last token alone, and what picks it is not found: export it with "
        "--all-logits to score it"
    )


def _axis(node: Any) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)

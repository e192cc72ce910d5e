"""What a program returns: a name for each output, and which outputs are inputs with something written into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.fx import Node

from spinpass.graph import is_float, op_name, value

from .interpreter import origin, user_input_names

_CACHE_WRITES = frozenset({"aten::cat", "aten::index_copy", "aten::index_put", "aten::slice_scatter", "aten::scatter",
                           "aten::select_scatter", "aten::copy", "aten::index_add"})  # fmt: skip


def output_names(ep: ExportedProgram) -> list[str]:
    """Return a name for every flat user output: its path in what is returned, with the node's name where it is bare."""
    specs = [s for s in ep.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    paths = list(_paths(ep.call_spec.out_spec))
    if len(paths) != len(specs):  # a program edited by hand
        paths = [str(i) for i in range(len(specs))]
    nodes = [getattr(s.arg, "name", "") for s in specs]
    return [path if path[:1].isalpha() else f"output {path} ({node})".replace("  ", " ").removesuffix(" ()")
            for path, node in zip(paths, nodes, strict=True)]  # fmt: skip


def _paths(spec: Any, prefix: str = "") -> Iterator[str]:
    """Yield the path of every leaf of a structure, its keys joined by dots."""
    if spec.is_leaf():
        yield prefix
        return
    children = spec.children() if hasattr(spec, "children") else spec.children_specs  # older torch
    named = isinstance(spec.context, list) and len(spec.context) == len(children)  # dicts and output classes
    keys = spec.context if named else range(len(children))
    for key, child in zip(keys, children, strict=True):
        yield from _paths(child, f"{prefix}.{key}" if prefix else str(key))


def returned_state(ep: ExportedProgram) -> dict[int, str]:
    """Return {index of a user output: user input} where the output is the input with something written or joined to it.

    The input is given by the name of its placeholder.
    """
    nodes = {node.name: node for node in ep.graph.nodes}
    users = set(user_input_names(ep))
    outputs = [s.arg.name for s in ep.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    found: dict[int, str] = {}
    for i, name in enumerate(outputs):
        source = _written_input(nodes[name]) if name in nodes else None
        if source is not None and source.name in users - set(found.values()) and _same_kind(source, nodes[name]):
            found[i] = source.name
    return found


def continued_inputs(ep: ExportedProgram) -> dict[str, int]:
    """Return {input: index of the user output that continues it}.

    What is left when all writes are found goes in order, an input to an output of its shape: the states of recurrent
    layers are computed anew. What is handed back as it came counts too.
    """
    pairs = {name: index for index, name in returned_state(ep).items()}
    nodes = {node.name: node for node in ep.graph.nodes}
    returned = [s.arg for s in ep.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    free = [i for i, arg in enumerate(returned) if i not in pairs.values() and not isinstance(arg, ConstantArgument)]
    for name in (name for name in user_input_names(ep) if name not in pairs):
        if _is_token_wise(nodes.get(name)):
            continue
        same = next((i for i in free if i and _alike(nodes.get(name), nodes.get(returned[i].name))), None)
        if same is not None:
            pairs[name] = same
            free.remove(same)
    return pairs


def _is_token_wise(node: Node | None) -> bool:
    """Say whether an input is integers of several axes: token ids, positions, a mask."""
    held = None if node is None else value(node)
    return isinstance(held, Tensor) and not held.is_floating_point() and held.ndim > 0


def _alike(a: Node | None, b: Node | None) -> bool:
    x, y = (None if node is None else value(node) for node in (a, b))
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and str(x.shape) == str(y.shape)


def _written_input(node: Node) -> Node | None:
    """Return the placeholder behind ``node`` if a cache write lies between them, else None."""
    for writer in _chain(node):
        if op_name(writer).removesuffix("_") in _CACHE_WRITES:
            roots = [origin(source) for source in writer.all_input_nodes]
            return next((root for root in roots if root.op == "placeholder" and is_float(root)), None)
    return None


def _chain(node: Node) -> Iterator[Node]:
    """Yield ``node`` and what it shows, step by step, to the origin."""
    end = origin(node)
    while node is not end:
        yield node
        node = node.all_input_nodes[0]
    yield end


def _same_kind(a: Node, b: Node) -> bool:
    x, y = value(a), value(b)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == y.ndim and x.dtype == y.dtype

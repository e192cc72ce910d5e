"""Written memory, run in both forms:  what a reader sees after x.op_(y)  =  what the functional graph computes for it.

Which nodes view which memory is this package's own analysis. It is not believed: everything that shows the memory is
run as it was exported, in place, and what each reader sees at its turn is compared with what the functional nodes
compute. What is no part of the memory is drawn, so this needs no weights, and costs a few small views and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from spinpass.graph import ConcreteSizes, ProgramEditor, called, drawn, value

_RELATIVE = 1e-5  # an in-place operator rounds where the functional one and a cast do

Reads = Mapping[tuple[str, str], Node]
"""By reader and what it reads, as the exported graph names both: what it reads in the functional graph."""


def wrong_read(
    exported: Graph, editor: ProgramEditor, memory: Iterable[Node], roots: Iterable[Node], reads: Reads
) -> str:
    """Return the name of the first reader that sees other values in the functional graph; empty where there is none.

    Args:
        exported: the graph with its in-place operators.
        editor: the functional program, whose nodes have the names of the exported ones.
        memory: all nodes that show written memory, in-place operators included.
        roots: those of them that own it.
        reads: what is to be compared.

    Also empty where the memory cannot be run by itself.
    """
    shows, owners = {node.name for node in memory}, {root.name for root in roots}
    values = _Values(editor)
    try:
        seen = _seen(exported, shows, owners, values, reads)
        functional = _Functional(values, {node.name for node in exported.nodes if node.name not in shows - owners})
        for (reader, source), node in reads.items():
            if (reader, source) in seen and not _same(seen[reader, source], functional.of(node)):
                return reader
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AssertionError, NotImplementedError):
        return ""
    return ""


class _Values:
    """What is no part of the memory: the program's own integers, and drawn values, the same under the same name."""

    def __init__(self, editor: ProgramEditor) -> None:
        self._editor, self._sizes = editor, ConcreteSizes()
        self._nodes = {node.name: node for node in editor.nodes}
        self._drawn: dict[str, Any] = {}

    def of(self, node: Node) -> Any:
        if node.name not in self._drawn:
            self._drawn[node.name] = self._draw(node)
        return self._drawn[node.name]

    def _draw(self, node: Node) -> Any:
        val = value(node)
        if not isinstance(val, Tensor):
            return self._sizes.of(val)
        here = self._nodes.get(node.name, node)
        generator = torch.Generator("cpu").manual_seed(crc32(node.name.encode()))
        return drawn(self._editor, here, self._sizes.shape(node), generator).to(val.dtype)


def _seen(
    exported: Graph, memory: set[str], roots: set[str], values: _Values, reads: Reads
) -> dict[tuple[str, str], Any]:
    """Run the memory in place, in the order of the graph, and return what each reader sees when its turn comes."""
    here: dict[str, Any] = {}
    seen: dict[tuple[str, str], Any] = {}
    for node in exported.nodes:
        for source in node.all_input_nodes:
            if (node.name, source.name) in reads and source.name in here:
                seen[node.name, source.name] = _copied(here[source.name])
        if node.name in roots:
            here[node.name] = _copied(values.of(node))
        elif node.name in memory:

            def operand(source: Node) -> Any:
                return here[source.name] if source.name in here else values.of(source)

            here[node.name] = called(node, map_arg(node.args, operand), dict(map_arg(node.kwargs, operand)))
    return seen


class _Functional:
    """The functional nodes, from the same values: those that are not ``given``."""

    def __init__(self, values: _Values, given: set[str]) -> None:
        self._values, self._given = values, given
        self._known: dict[Node, Any] = {}

    def of(self, node: Node) -> Any:
        if node not in self._known:
            self._known[node] = self._values.of(node) if node.name in self._given else self._run(node)
        return self._known[node]

    def _run(self, node: Node) -> Any:
        return called(node, map_arg(node.args, self.of), dict(map_arg(node.kwargs, self.of)))


def _copied(tensor: Any) -> Any:
    return tensor.clone() if isinstance(tensor, Tensor) else tensor


def _same(seen: Any, found: Any) -> bool:
    if not isinstance(seen, Tensor):
        return True
    if not isinstance(found, Tensor) or seen.shape != found.shape or seen.dtype != found.dtype:
        return False
    if not seen.is_floating_point():
        return bool(torch.equal(seen, found))
    return bool(torch.allclose(found.double(), seen.double(), rtol=_RELATIVE, atol=_RELATIVE, equal_nan=True))

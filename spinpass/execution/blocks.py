"""A program run block by block: what lives between two blocks is all that a run needs to go on.

    x  ->  v₁ = b₁(x)  ->  v₂ = b₂(v₁)  ->  …

Cuts are made where few values live, which in a decoder is between two layers, and are found from sizes alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.graph import mutates, reachable

from .interpreter import Runner
from .recomputed import fixed_constants, live_bytes, main_output, node_bytes, nodes_behind
from .synthetic import bound_sizes, user_inputs


def blocks_of(
    ep: ExportedProgram, values: Mapping[str, Any], counted: Collection[str], each: int, known: Collection[str]
) -> list[list[Node]]:
    """Return, for each block, the nodes whose values live behind it; those of the last are the first user output.

    Args:
        ep: the program.
        values: user inputs by placeholder name, for the sizes of axes.
        counted: the constants, by placeholder name, that are shared out among the blocks.
        each: how many of them a block reads at least, which no block before it reads.
        known: names of nodes; nothing else may live between two blocks.

    Raises ConfigError: the program writes in place, or its first output is computed of nothing.
    """
    wanted = main_output(ep)
    nodes = nodes_behind(wanted, ep.graph.nodes) if isinstance(wanted, Node) else []
    if not nodes or any(map(mutates, ep.graph.nodes)):
        raise ConfigError("only a program that computes its first output without writing in place has blocks")
    sizes = bound_sizes(user_inputs(ep), values)
    inside = set(nodes)
    live = list(live_bytes(nodes, wanted, [node_bytes(node, sizes) for node in nodes]))[1:-1]
    first = [_read_first(node, counted, seen) for seen in [set[str]()] for node in nodes]
    found: list[list[Node]] = []
    for at in _cuts(first, live, each):
        before = set(nodes[:at])
        living = [node for node in nodes[:at] if any(n in inside and n not in before for n in node.users)]
        if all(node.name in known for node in living):
            found.append(living)
    assert isinstance(wanted, Node)
    return [*found, [wanted]]


def block_run(
    ep: ExportedProgram,
    given: Mapping[Node, Any],
    wanted: Sequence[Node],
    replaced: Mapping[str, Tensor],
    *,
    gradients: bool = False,
) -> dict[Node, Any]:
    """Return the values of some nodes, computed from those that are given, user inputs among them.

    Args:
        ep: the program.
        given: values by node.
        wanted: nodes of the program.
        replaced: constants to take in place of the stored ones, by placeholder name.
        gradients: record the gradients of the values that require them.

    Raises ProgramError: a node could not be run.
    """
    needed = _needed(given, wanted)
    known = {**fixed_constants(ep), **replaced}
    runner = Runner(ep.graph_module, float64=False)
    runner.env = {node: given[node] if node in given else known[node.name] for node in needed if _is_there(node, given)}
    runner.user_to_last_uses = _last_uses(ep, needed, wanted)
    with torch.set_grad_enabled(gradients):
        for node in ep.graph.nodes:
            if node in needed and node not in runner.env:
                runner.advance(node)
    return {node: runner.env[node] for node in wanted}


def read_constants(ep: ExportedProgram, given: Collection[Node], wanted: Sequence[Node]) -> set[str]:
    """Return the names of the placeholders that are read between what is given and what is wanted."""
    return {node.name for node in _needed(given, wanted) if node.op == "placeholder"}


def _needed(given: Collection[Node], wanted: Sequence[Node]) -> set[Node]:
    return {found for node in wanted for found in reachable(node, lambda n: () if n in given else n.all_input_nodes)}


def _is_there(node: Node, given: Mapping[Node, Any]) -> bool:
    return node in given or node.op == "placeholder"


def _cuts(read: Sequence[int], live: Sequence[int], each: int) -> Iterator[int]:
    """Yield where blocks begin but the first: where the least lives, ``each`` constants on and before twice as many.

    Args:
        read: how many constants each node reads that none before it has.
        live: how many bytes live behind each node.
        each: how many constants a block has at least, the last one included.
    """
    left, at = sum(read), 0
    while left >= 2 * each:
        counted, best = 0, 0
        for end in range(at + 1, len(read)):
            counted += read[end - 1]
            if counted >= 2 * each or left - counted < each:
                break
            if counted >= each and (not best or live[end - 1] < live[best - 1]):
                best = end
        if not best:
            return
        left -= sum(read[at:best])
        at = best
        yield at


def _read_first(node: Node, counted: Collection[str], seen: set[str]) -> int:
    """Return how many of the constants a node reads that none before it has, and take them down."""
    new = {source.name for source in node.all_input_nodes if source.name in counted} - seen
    seen |= new
    return len(new)


def _last_uses(ep: ExportedProgram, needed: Collection[Node], wanted: Collection[Node]) -> dict[Node, list[Node]]:
    """By node, the values that nothing reads after it."""
    last = {source: node for node in ep.graph.nodes if node in needed for source in node.all_input_nodes}
    found: dict[Node, list[Node]] = {}
    for source, node in last.items():
        if source not in wanted and source.op != "placeholder":
            found.setdefault(node, []).append(source)
    return found

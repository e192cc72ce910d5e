"""A program run for its gradients, with few of its values kept:  y = sₙ(… s₁(x)), and each sᵢ is run again backwards.

What the backward pass needs of a stretch of the graph is computed once more when it comes there, from the values at the
stretch's beginning. Stretches begin where few values live, which in a decoder is between two layers, and there are as
many as make what all beginnings keep about as much as one stretch needs.

Source: Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from spinpass.errors import ConfigError
from spinpass.graph import mutates, shape, value

from .interpreter import Runner, Watch, constants, execute
from .synthetic import Sizes, bound_sizes, concrete, user_inputs

KEPT_BYTES = 1 << 30
"""How many bytes of values are kept for a backward pass. What has more is computed twice, a third more time."""


def first_output(
    ep: ExportedProgram, values: Mapping[str, Any], *, most: int = KEPT_BYTES, watch: Watch | None = None
) -> Any:
    """Return the first user output of ``ep``, with the gradients of what requires them.

    Args:
        ep: the program. One that writes in place is run plainly.
        values: the user inputs, and those constants that are replaced, by placeholder name.
        most: how many bytes of values may be kept for the backward pass; where there are more they are computed twice.
        watch: called with every node that is run and its value, once more where that is computed twice; it returns the
            value to go on with. Gradients go through the values of the first time.

    Raises:
        ProgramError: a node could not be run.
    """
    wanted = main_output(ep)
    nodes = nodes_behind(wanted, ep.graph.nodes) if isinstance(wanted, Node) else []
    if not nodes or any(map(mutates, ep.graph.nodes)):
        return execute(ep, {**fixed_constants(ep), **values}, gradients=True, watch=watch).outputs[0]
    known = {**fixed_constants(ep), **values}
    env = {node: known[node.name] for node in ep.graph.nodes if node.op == "placeholder" and node.name in known}
    cuts = _cuts(nodes, wanted, bound_sizes(user_inputs(ep), values), most)
    with torch.enable_grad():
        for start, end in pairwise([0, *cuts, len(nodes)]):
            living = _read_by(nodes[end:]) | {wanted}
            env |= _advanced(ep, nodes[start:end], living, env, again=bool(cuts), watch=watch)
            env = {node: found for node, found in env.items() if node in living}
    return env[wanted]


def fixed_constants(ep: ExportedProgram) -> dict[str, Any]:
    """Return the constants of a program without gradients, so that a backward pass leaves nothing in them."""
    known = constants(ep)
    return {
        name: each.detach() if isinstance(each, Tensor) and each.requires_grad else each for name, each in known.items()
    }


def main_output(ep: ExportedProgram) -> Any:
    """Return the node of the first user output, or the plain value where it is none."""
    at = next(i for i, spec in enumerate(ep.graph_signature.output_specs) if spec.kind.name == "USER_OUTPUT")
    return ep.graph.output_node().args[0][at]


def nodes_behind(wanted: Node, nodes: Collection[Node]) -> list[Node]:
    """Return what has to be run for a value, in order."""
    needed = {wanted}
    for node in reversed(list(nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed and node.op != "placeholder"]


def _read_by(nodes: Sequence[Node]) -> set[Node]:
    return {source for node in nodes for source in node.all_input_nodes}


def _advanced(
    ep: ExportedProgram,
    stretch: Sequence[Node],
    living: Collection[Node],
    env: Mapping[Node, Any],
    *,
    again: bool,
    watch: Watch | None,
) -> dict[Node, Any]:
    """Run a stretch and return those of its values that live on; ``again``: keep no others for the backward pass."""
    taken = {node: env[node] for node in _read_by(stretch) if node in env}
    kept = [node for node in stretch if node in living]

    def run() -> list[Any]:
        runner = Runner(ep.graph_module, float64=False, watch=watch)
        runner.env = dict(taken)
        for node in stretch:
            runner.advance(node)
        return [runner.env[node] for node in kept]

    found = checkpoint(run, use_reentrant=False) if again else run()
    return dict(zip(kept, found, strict=True))


def _cuts(nodes: Sequence[Node], wanted: Node, sizes: Sizes, most: int) -> list[int]:
    """Return where stretches begin but the first; none where all values may be kept."""
    bytes_of = [node_bytes(node, sizes) for node in nodes]
    before = [0, *accumulate(bytes_of)]
    if before[-1] <= most:
        return []
    live = list(live_bytes(nodes, wanted, bytes_of))
    inside = live[1:-1]
    count = round(math.sqrt(before[-1] / max(1, min(inside, default=1))))
    found: list[int] = []
    for k in range(1, min(count, len(nodes))):
        low, high = (before[-1] * (k + side) / count for side in (-0.5, 0.5))
        near = [i for i in range(1, len(nodes)) if low <= before[i] < high]
        if near:
            found.append(min(near, key=live.__getitem__))
    return found


def live_bytes(nodes: Sequence[Node], wanted: Node, bytes_of: Sequence[int]) -> Iterator[int]:
    """Yield how many bytes of values live in front of each node, and behind the last."""
    last = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    ending: dict[int, int] = {}
    total = 0
    for i, (node, size) in enumerate(zip(nodes, bytes_of, strict=True)):
        yield total
        total += size
        if node is not wanted:
            ending[last[node]] = ending.get(last[node], 0) + size
        total -= ending.get(i, 0)
    yield total


def node_bytes(node: Node, sizes: Sizes) -> int:
    """Return the bytes of a value that a run makes anew; 0 for what is no tensor or of a size that is not known."""
    fake = value(node)
    if not isinstance(fake, Tensor):
        return 0
    try:
        return math.prod(concrete(size, sizes) for size in shape(node)) * fake.dtype.itemsize
    except ConfigError:
        return 0

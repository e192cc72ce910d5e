"""Run a program on many inputs side by side, all of them up to a node that is watched before one goes on.

There, what every input makes of the node's operand is at hand, and constants can be replaced before the node is run. So
the layers behind see what earlier ones have become, in one run. Of every input the values are kept that some watched
node still needs. What lies between two such nodes, for example the scores of an attention, is kept of one input at a
time. What is only returned, for example a KV cache, is not computed. Where asked for, the original program runs beside
it, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.execution import Runner, constants, flat_inputs
from spinpass.progress import Progress

from ..layers import leading_to

OperandWatch = Callable[[list[Tensor], list[Tensor]], Mapping[str, Tensor]]
"""The values of one operand, one per input, and those in the original program -> constants by placeholder name."""

SiteWatch = tuple[str, OperandWatch] | tuple[str, OperandWatch, str]
"""The name of an operand and what to do with its values. With a third name, the values of that operand are given in
place of those in the original program."""


def run_in_lockstep(
    program: ExportedProgram,
    inputs: Sequence[object],
    watched: Mapping[str, SiteWatch],
    reference: Collection[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Run ``program`` on all ``inputs`` up to the last watched node. The program is not changed.

    Args:
        program: its constants may be replaced on the way, for this run only.
        inputs: as for :func:`spinpass.quantization.quantize`.
        watched: by name of a node, what to do before the node is run.
        reference: the names of the roundings that the original program does not have. It runs beside ``program``, with
            the first operand of these nodes in their place and all constants left alone. None runs no original:
            watches are given the same values twice.
        progress: called with (watched nodes done, all watched nodes).

    Raises:
        ConfigError: the inputs do not fit the program.
    """
    module = program.graph_module
    stored = constants(program)
    nodes = {n.name: n for n in module.graph.nodes}
    runners: list[Runner] = []
    references: list[Runner] = []
    for values in inputs:
        known = {**stored, **flat_inputs(program, values)}
        for side in (runners, references) if reference is not None else (runners,):
            side.append(Runner(module, float64=False))
            side[-1].env = {n: known[n.name] for n in module.graph.nodes if n.op == "placeholder"}
    wanted = {nodes[name] for name in watched}
    needed = wanted | leading_to(wanted, module.graph.nodes)
    order = [node for node in module.graph.nodes if node in needed and node.op != "placeholder"]
    finished = _last_uses(order)
    done = 0
    ahead: list[Node] = []
    skipped = frozenset(reference or ())
    with torch.no_grad():
        for node in order:
            if node in wanted:
                for runner in runners:
                    _advance(runner, ahead, finished)
                for runner in references:
                    _advance(runner, ahead, finished, skipped)
                ahead = []
                operand, watch, *beside = watched[node.name]
                seen = [r.env[nodes[operand]] for r in runners]
                sides = [(runners, other) for other in beside] or [(references, operand)]
                others = [r.env[nodes[other]] for side, other in sides for r in side]
                for name, tensor in watch(seen, others or seen).items():
                    for runner in runners:
                        runner.env[nodes[name]] = tensor
                done += 1
                if progress is not None:
                    progress(done, len(watched))
            ahead.append(node)


def _last_uses(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """By node of ``order``, the values that no later node reads."""
    last = {source: node for node in order for source in node.all_input_nodes}
    found: dict[Node, list[Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found


def _advance(
    runner: Runner, nodes: Sequence[Node], finished: Mapping[Node, list[Node]], skipped: Collection[str] = ()
) -> None:
    """Run ``nodes``, those in ``skipped`` excepted, which take the value of their first operand."""
    for node in nodes:
        runner.env[node] = runner.env[node.all_input_nodes[0]] if node.name in skipped else runner.run_node(node)
        for source in finished.get(node, []):
            del runner.env[source]

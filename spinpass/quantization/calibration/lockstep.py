"""Run a program on many inputs side by side, all of them up to a node that is watched before one goes on.

There, what every input makes of its operands is at hand, and constants can be replaced before the node is run: so the
layers behind see what earlier ones have become, in one run. Of every input the values are kept that some watched node
still needs, and what lies between two such nodes (the scores of an attention, say) of one input at a time; what is only
returned, a KV cache for instance, is not. Where asked for, the same program without any of that runs beside it, to
compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.execution import Runner, constants, flat_inputs

from ..layers import leading_to

# values of one operand, and those of the program as it was, -> constants by placeholder name
OperandWatch = Callable[[list[Tensor], list[Tensor]], Mapping[str, Tensor]]


def run_in_lockstep(
    program: ExportedProgram,
    inputs: Sequence[object],
    watched: Mapping[str, tuple[str, OperandWatch]],
    reference: Collection[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``watched``: node name -> (name of the operand whose values it wants, what to do with them); several watches of a
    node stand in one. ``reference``: run the program as it was as well, which takes the first operand of these nodes in
    their place; without it watches are given the same values twice. The run ends with the last watched node.
    ``progress``: watched nodes done, and all.
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
                operand, watch = watched[node.name]
                seen, unchanged = ([r.env[nodes[operand]] for r in side] for side in (runners, references))
                for name, tensor in watch(seen, unchanged or seen).items():
                    for runner in runners:
                        runner.env[nodes[name]] = tensor
                done += 1
                if progress is not None:
                    progress(done, len(watched))
            ahead.append(node)


def _last_uses(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """By node, the values that no later one of ``order`` reads."""
    last = {source: node for node in order for source in node.all_input_nodes}
    found: dict[Node, list[Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found


def _advance(
    runner: Runner, nodes: Sequence[Node], finished: Mapping[Node, list[Node]], skipped: Collection[str] = ()
) -> None:
    for node in nodes:
        runner.env[node] = runner.env[node.all_input_nodes[0]] if node.name in skipped else runner.run_node(node)
        for source in finished.get(node, []):
            del runner.env[source]

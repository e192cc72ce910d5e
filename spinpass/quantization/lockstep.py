"""Run a program on many inputs node by node, all of them one node further before the next.

At a node that is watched, what every input makes of its operands is at hand, and constants can be replaced before the
node is run: so the layers behind see what earlier ones have become, in one run, and no more than the values that are
alive at one node is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..execution import Runner, constants, flat_inputs

Watch = Callable[[list[Tensor]], Mapping[str, Tensor]]  # values of one operand -> constants by placeholder name


def run_in_lockstep(
    program: ExportedProgram,
    inputs: Sequence[object],
    watched: Mapping[str, tuple[str, Watch]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``watched``: node name -> (name of the operand whose values it wants, what to do with them); several watches of a
    node stand in one. The run ends with the last watched node. ``progress``: watched nodes done, and all.
    """
    module = program.graph_module
    runners = [Runner(module, float64=False) for _ in inputs]
    stored = constants(program)
    nodes = {n.name: n for n in module.graph.nodes}
    for runner, values in zip(runners, inputs):
        known = {**stored, **flat_inputs(program, values)}
        runner.env = {n: known[n.name] for n in module.graph.nodes if n.op == "placeholder"}
    done = 0
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.name in watched:
                operand, watch = watched[node.name]
                for name, tensor in watch([runner.env[nodes[operand]] for runner in runners]).items():
                    for runner in runners:
                        runner.env[nodes[name]] = tensor
                done += 1
                if progress is not None:
                    progress(done, len(watched))
                if done == len(watched):
                    return
            for runner in runners:
                _step(runner, node)


def _step(runner: Runner, node: Node) -> None:
    runner.env[node] = runner.run_node(node)
    for finished in runner.user_to_last_uses.get(node, []):
        del runner.env[finished]

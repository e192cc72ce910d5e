"""All inputs up to a watched node, and no more alive between two of them than one input's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from spinpass.execution.interpreter import Runner, constants, execute, flat_inputs, run
from spinpass.quantization.calibration.lockstep import run_in_lockstep
from tests.support.decoders import Decoder, exported, made
from tests.support.quantizable import inputs

PROGRAM = exported(made(Decoder(layers=2, spelled=True), dtype=torch.float32))
NODES = {n.name: n for n in PROGRAM.graph.nodes}
LINEARS = [name for name, node in NODES.items() if str(node.target) == "aten.linear.default"]


def test_scores_of_one_input_are_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runners: dict[int, Runner] = {}
    most, seen = 0, 0
    plain = Runner.run_node

    def watched_run(self: Runner, node: Node) -> Any:
        nonlocal most, seen
        runners[id(self)] = self
        scores = [n for r in runners.values() for n in r.env if "softmax" in n.name]
        most, seen = max(most, len(scores)), seen + ("softmax" in node.name)
        return plain(self, node)

    monkeypatch.setattr(Runner, "run_node", watched_run)
    run_in_lockstep(PROGRAM, inputs(5), {name: (operand(name), lambda values, _: {}) for name in LINEARS})
    assert len(runners) == 5 and seen == 5 * 2 and most == 1


def test_a_watch_sees_all_inputs_and_what_earlier_ones_have_changed() -> None:
    first, last = LINEARS[0], LINEARS[-1]
    changed, head = (NODES[name].all_input_nodes[1].name for name in (first, last))
    stored = constants(PROGRAM)
    zeros = torch.zeros_like(stored[changed])
    found: dict[str, list[Tensor]] = {}

    def change(values: list[Tensor], _: list[Tensor]) -> Mapping[str, Tensor]:
        found[first] = values
        return {changed: zeros}

    def look(values: list[Tensor], originals: list[Tensor]) -> Mapping[str, Tensor]:
        found[last] = values
        assert not any(torch.equal(a, b) for a, b in zip(values, originals, strict=True))
        return {}

    run_in_lockstep(PROGRAM, inputs(3), {first: (operand(first), change), last: (operand(last), look)}, reference=())
    assert len(found[first]) == 3
    for ids, value in zip(inputs(3), found[last], strict=True):
        logits = value @ stored[head].T
        zeroed = execute(PROGRAM, {**flat_inputs(PROGRAM, ids), changed: zeros}).outputs[0]
        assert torch.allclose(logits, zeroed, atol=1e-5)
        assert not torch.allclose(logits, run(PROGRAM, ids)[0], atol=1e-5)


def operand(linear: str) -> str:
    return NODES[linear].all_input_nodes[0].name


def test_what_is_only_returned_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            kept = self.first(x)
            return self.second(kept.relu()), kept.sin()

    program = torch.export.export(Returning(), (torch.randn(2, 8),))
    names = {str(n.target): n.name for n in program.graph.nodes}
    linears = [n for n in program.graph.nodes if str(n.target) == "aten.linear.default"]
    executed: list[str] = []
    plain = Runner.run_node
    monkeypatch.setattr(Runner, "run_node", lambda self, node: executed.append(node.name) or plain(self, node))
    watches = {n.name: (n.all_input_nodes[0].name, lambda values, _: {}) for n in linears}
    run_in_lockstep(program, [(torch.randn(2, 8),)], watches)
    assert executed == [linears[0].name, names["aten.relu.default"]]

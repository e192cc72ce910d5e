"""Planning a mixture of experts: nodes are visited a number of times that grows with the layers, not with the paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import spinpass
from spinpass.analysis.basis import linear_input, walk
from spinpass.analysis.patterns import linear, residual
from spinpass.graph import ProgramEditor, expressions, nodes, op_name
from tests.support import experts

WALKERS = (expressions, linear_input, walk, linear, residual)


def visits(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many nodes the walks of one plan yield."""
    count = 0

    def counted(start: Node, following: Callable[[Node], Iterable[Node]], steps: int | None = None) -> Iterator[Node]:
        nonlocal count
        for node in nodes.reachable(start, following, steps):
            count += 1
            yield node

    program = experts.program(layers, "batched_mm")
    for module in WALKERS:
        monkeypatch.setattr(module, "reachable", counted)
    assert spinpass.plan(program).spaces
    return count


def test_visits_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    two, four = visits(2, monkeypatch), visits(4, monkeypatch)
    assert 0 < four <= 2.2 * two, (two, four)


def test_a_gathered_weight_is_its_stack_alone() -> None:
    """The router in front of the gather, and all before it, is no part of the weight."""
    editor = ProgramEditor(experts.program(4, "batched_mm"))
    products = [n for n in editor.nodes if op_name(n) == "aten::bmm" and editor.is_weight(n.args[0])]
    assert len(products) == 8
    for node in products:
        stored = editor._expressions.behind(node.args[0])
        assert [editor.fqn(n).split(".")[-1] for n in stored] in (["gate_up_proj"], ["down_proj"])


class Doubling(nn.Module):
    """A weight w + wᵀ·… whose expression meets itself again and again: 2^depth paths lead to the parameter."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth, self.weight = depth, nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        for _ in range(self.depth):
            w = (w + w.transpose(0, 1)) * 0.5
        return torch.nn.functional.linear(x, w)


def test_expressions_that_meet_again_cost_their_nodes() -> None:
    """With a walk of paths none of these would come to an end."""
    program = torch.export.export(Doubling(80), (torch.randn(2, 8),))
    editor = ProgramEditor(program)
    weight = next(n for n in editor.nodes if op_name(n) == "aten::linear").args[1]
    (stored,) = editor._expressions.behind(weight)
    assert editor.fqn(stored) == "weight" and editor.is_computable(weight)
    assert editor.canonical(weight) is weight
    stored_weight = program.state_dict["weight"].double()
    symmetric = (stored_weight + stored_weight.T) / 2
    torch.testing.assert_close(editor.deferred(weight)(), symmetric, rtol=0, atol=1e-12)


def test_a_walk_yields_every_node_once_and_the_nearest_first() -> None:
    program = torch.export.export(Doubling(3), (torch.randn(2, 8),))
    last = next(n for n in program.graph.nodes if op_name(n) == "aten::linear")
    found = list(nodes.reachable(last, lambda n: n.all_input_nodes))
    assert len(found) == len(set(found)) and found[0] is last
    assert list(nodes.reachable(last, lambda n: n.all_input_nodes, 0)) == [last]
    assert set(nodes.reachable(last, lambda n: n.all_input_nodes, 1)) == {last, *last.all_input_nodes}

"""Functionalize: the same values without in-place operators, whatever view the writes go through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.certificate.programs import run
from spinpass.execution.interpreter import execute, flat_inputs
from spinpass.graph import mutates, op_name
from spinpass.passes import functionalize as functionalize_pass
from spinpass.passes.functionalize import open_program

X, Y = (torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
Function = Callable[[Tensor, Tensor], Tensor]


def program(function: Function, *args: Tensor) -> ExportedProgram:
    class Host(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

    return torch.export.export(Host(), args or (X, Y))


def arithmetic(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    w = z.mul_(y)
    z.add_(w, alpha=0.5)
    return z.clamp_(-1, 1) + w


def promoted(x: Tensor, y: Tensor) -> Tensor:
    z = x.to(torch.float32) * 2
    z.mul_(y.sum())
    return z


def through_slice(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z[:, 1:3].mul_(2)
    return z


def through_a_chain(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z.transpose(0, 1)[1][2].view(2, 3)[1].unsqueeze(0)[:, 1:].copy_(y.flatten()[:2])
    return z * y


def siblings(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    a, b = z[:, :2], z[:, 1:]
    a.add_(1)
    b.mul_(3)
    a.sub_(y[:, :2])
    return torch.cat([a, b, z], 1)


def before_and_after(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    early = z + 0
    z[0].zero_()
    return early + z


def pieces(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    a, b = z.split(3, -1)
    a.mul_(2)
    b.copy_(a)
    z.unbind(0)[2].add_(y[0])
    return z + torch.cat([b, a], -1)


def assembled(x: Tensor, y: Tensor) -> Tensor:
    z = x.new_empty(3, 4, 10)
    z[..., :6].copy_(x)
    z[..., 6:].copy_(y[..., :4])
    return z


def assembled_partly(x: Tensor, y: Tensor) -> Tensor:
    z = x.new_zeros(3, 4, 10)
    z[..., 2:8].copy_(x)
    z[..., 8:].copy_(y[..., :2])
    return z


def indexed(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.index_put_((torch.tensor([2, 0]),), y[:2])
    z.scatter_(1, torch.zeros(3, 1, 6, dtype=torch.int64), y[:, :1])
    return z.masked_fill_(y > 1, 0.25)


def reshaped(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z.unsqueeze(0).flatten(0, 1).permute(2, 0, 1)[::2].add_(y.permute(2, 0, 1)[::2])
    return z


def broadcast(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z[1:].copy_(y[0, 0])
    z.narrow(1, 1, 2).fill_(0.5)
    return z


def seen_between_writes(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z.mul_(2)
    seen = z[:, :2]
    z[:, :2] = y[:, 2:] * 5
    return seen + 1


def written_by_turns(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    a = z[:, :2]
    z.mul_(2)
    b = z[:, 1:3]
    b.add_(y[:, 1:3])
    a.mul_(3)
    z.view(-1)[::5].sub_(1)
    return torch.cat([a, b, z], 1)


def einsum_is_a_view(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    torch.einsum("ijk->kji", z).mul_(3)
    return z + y


def composed_views(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z.mT.add_(1)
    torch.moveaxis(z, 0, 1).mul_(2)
    torch.swapaxes(z, 1, 2)[0].copy_(y[0].mT)
    z.expand_as(z).sub_(y)
    z.contiguous().mul_(3)
    z.type_as(y).add_(5)
    torch.atleast_2d(z).mul_(0.5)
    return z


CASES: list[Function] = [arithmetic, promoted, through_slice, through_a_chain, siblings, before_and_after, pieces,
                         assembled, assembled_partly, indexed, reshaped, broadcast, seen_between_writes,
                         written_by_turns, einsum_is_a_view, composed_views]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_same_values_without_in_place_operators(case: Function) -> None:
    source = program(case)
    assert any(mutates(n) for n in source.graph.nodes)
    result = open_program(source).finish()
    assert not any(mutates(n) for n in result.graph.nodes)
    assert torch.equal(run(result, (X, Y))[0], case(X, Y))
    assert all(n.meta["val"].dtype == torch.float64 for n in result.graph.nodes if op_name(n) == "aten::mul") or (
        case is promoted
    )


def test_writes_that_cover_an_axis_become_a_concatenation() -> None:
    names = [op_name(n) for n in open_program(program(assembled)).nodes]
    assert "aten::cat" in names and "aten::slice_scatter" not in names
    names = [op_name(n) for n in open_program(program(assembled_partly)).nodes]
    assert "aten::slice_scatter" in names


def test_a_program_without_writes_keeps_its_nodes() -> None:
    source = program(lambda x, y: (x * y).sum(-1))
    assert [n.name for n in open_program(source).nodes] == [n.name for n in source.graph.nodes]


def test_what_nothing_depends_on_is_gone() -> None:
    def unused(x: Tensor, y: Tensor) -> Tensor:
        torch.tanh(x)
        return x * y

    assert all(op_name(n) != "aten::tanh" for n in open_program(program(unused)).nodes)


def whole(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y)
    return x * 2


def part(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:3].copy_(2 * y[:, 1:3])
    return x.sum(-1) + y.sum(-1)


def both_and_again(x: Tensor, y: Tensor) -> Tensor:
    y.mul_(x)
    x[0].copy_(y[1])
    y[2].zero_()
    return x - y


@pytest.mark.parametrize("case", [whole, part, both_and_again], ids=lambda f: f.__name__)
def test_writes_to_inputs_are_outputs(case: Function, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = program(case)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)  # the program is not traced again
    result = open_program(source).finish()
    assert not any(mutates(n) for n in result.graph.nodes)
    written = set(result.graph_signature.user_inputs_to_mutate.values())
    assert written == ({"x", "y"} if case is both_and_again else {"x"})
    torch.export.save(result, tmp_path / "saved.pt2")
    inputs = {"x": X.clone(), "y": Y.clone()}
    expected = case(inputs["x"], inputs["y"])
    for ep in (result, torch.export.load(tmp_path / "saved.pt2")):
        found = execute(ep, flat_inputs(ep, (X, Y)))
        assert torch.equal(found.outputs[0], expected)
        assert set(found.state) == written and all(torch.equal(found.state[n], inputs[n]) for n in written)
    x, y = X.clone(), Y.clone()
    assert torch.equal(result.module()(x, y), expected) and torch.equal(x, inputs["x"]) and torch.equal(y, inputs["y"])


# -- the analysis of the memory is checked by running it ---------------------------------------------------------------


def _forgets_a_write(monkeypatch: pytest.MonkeyPatch) -> Function:
    monkeypatch.setattr(functionalize_pass._Memory, "_put_back", lambda self, view, new, at: {view})
    return through_slice


def _repeats_what_was_redirected(monkeypatch: pytest.MonkeyPatch) -> Function:
    class Forgetful(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: object, item: object) -> None:
            pass

    init = functionalize_pass._Memory.__init__

    def wrong(self: functionalize_pass._Memory, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        self._shown = Forgetful()

    monkeypatch.setattr(functionalize_pass._Memory, "__init__", wrong)
    return seen_between_writes


FAULTS = [_forgets_a_write, _repeats_what_was_redirected]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_wrong_memory_is_seen_and_torch_does_it(
    fault: Callable[[pytest.MonkeyPatch], Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = fault(monkeypatch)
    right = open_program(program(case)).finish()
    assert torch.equal(run(right, (X, Y))[0], case(X, Y))
    monkeypatch.setattr(functionalize_pass, "wrong_read", lambda *args: "")  # without it the function is another
    wrong = open_program(program(case)).finish()
    assert not torch.equal(run(wrong, (X, Y))[0], case(X, Y))

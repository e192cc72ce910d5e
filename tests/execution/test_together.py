"""Several runs at once: a constant is read once for all of them, as a whole or a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from spinpass.errors import ProgramError
from spinpass.execution import execute, execute_together
from spinpass.graph import Handle, Held, sources, with_other_values


class Counted(Held):
    """Counts the rows that are read."""

    rows: ClassVar[int] = 0

    def read(self, rows: slice | Tensor) -> Tensor:
        found = super().read(rows)
        Counted.rows += len(found)
        return found


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64, bias=bias), nn.Linear(64, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[0] < 9)
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(params=[True, False], ids=["in parts", "whole"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    from spinpass.graph import handles

    if request.param:
        for module in (handles, sources):
            monkeypatch.setattr(module, "LARGE", 256)
        monkeypatch.setattr(sources, "_BLOCK", 128)
    Counted.rows = 0
    yield request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("float64", [True, False])
def test_rows_are_read_once_for_all(bias: bool, float64: bool, in_parts: bool) -> None:
    model = Two(bias).eval()
    program = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    weights = {n: Handle(Counted(t.detach(), t.dtype)) for n, t in program.state_dict.items() if t.ndim == 2}
    streamed = with_other_values(program, weights)
    given = [{"x": torch.randn(n, 8)} for n in (3, 1, 4)]
    found = execute_together(streamed, given, float64=float64)
    assert Counted.rows == 64 + 40
    for values, result in zip(given, found, strict=True):
        assert not isinstance(result, ProgramError)
        expected = execute(program, values, float64=float64).outputs[0]
        assert result.outputs[0].dtype == expected.dtype
        torch.testing.assert_close(result.outputs[0], expected)


def test_one_that_fails_leaves_the_others_alone(in_parts: bool) -> None:
    model = Two(False).eval()
    program = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    weights = {n: Handle(Counted(t.detach(), t.dtype)) for n, t in program.state_dict.items()}
    given = [{"x": torch.randn(2, 7)}, {"x": torch.randn(3, 8)}, {"x": torch.randn(2, 8).double()}]
    found = execute_together(with_other_values(program, weights), given)
    assert isinstance(found[0], ProgramError) and isinstance(found[2], ProgramError)
    assert not isinstance(found[1], ProgramError)
    torch.testing.assert_close(found[1].outputs[0], model(given[1]["x"]))


class Shifted(nn.Module):
    """A product whose bias is computed of what the run is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.first.weight, self.first.bias * x.mean())


def test_each_run_has_its_own_bias_and_weight(in_parts: bool) -> None:
    program = torch.export.export(Shifted().eval(), (torch.randn(3, 8),))
    weights = {n: Handle(Counted(t.detach(), t.dtype)) for n, t in program.state_dict.items()}
    streamed = with_other_values(program, weights)
    given = [{"x": torch.randn(3, 8)} for _ in range(3)]
    given[2]["p_first_weight"] = Handle(Counted(torch.randn(64, 8), torch.float32))
    for values, result in zip(given, execute_together(streamed, given), strict=True):
        assert not isinstance(result, ProgramError)
        torch.testing.assert_close(result.outputs[0], execute(streamed, values).outputs[0])

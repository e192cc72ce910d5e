"""States that are written in place become outputs, and inputs are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spinpass.errors import ExportError
from spinpass.execution import continued_inputs, run
from spinpass.passes import return_states


class Recurrent(nn.Module):
    """A convolution's window that moves on, and a sum that decays."""

    def __init__(self, *, returned: bool = True) -> None:
        super().__init__()
        self.returned = returned
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, window: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        seen = torch.cat([window, self.mix(x)], 1)
        window.copy_(seen[:, -3:])
        total.mul_(0.5).add_(seen.sum(1))
        return (seen + total[:, None], window, total) if self.returned else (seen, window)


def exported(module: nn.Module) -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    inputs = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(2, 4)
    return torch.export.export(module.eval(), tuple(t.clone() for t in inputs), strict=False), inputs


def test_what_was_written_is_returned_and_no_input_is_written() -> None:
    program, inputs = exported(Recurrent())
    theirs = [t.clone() for t in inputs]
    with torch.no_grad():
        expected = program.module()(*theirs)
    changed = return_states(program)
    assert not changed.graph_signature.user_inputs_to_mutate
    ours = [t.clone() for t in inputs]
    found = run(changed, dict(zip(("x", "window", "total"), ours, strict=True)))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert all(torch.equal(given, kept) for given, kept in zip(ours, inputs, strict=True))
    assert not all(torch.equal(given, kept) for given, kept in zip(theirs, inputs, strict=True))  # as it was
    assert continued_inputs(changed) == {"window": 1, "total": 2}
    assert return_states(changed) is changed


def test_a_program_that_writes_nothing_stays_itself() -> None:
    program = torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    assert return_states(program) is program


def test_what_is_not_returned_would_be_lost() -> None:
    program, _ = exported(Recurrent(returned=False))
    with pytest.raises(ExportError, match="writes to its input total and does not return it"):
        return_states(program)

"""Mutants of the pass that are wrong only where one draw of small numbers does not look; default settings, each is caught."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import VerificationError
from spinpass.graph import ProgramEditor
from tests.mutations.test_broken_pass import Patch, mutated, queue_unless, rotation_with, unscaled

ROWS, HIDDEN = 600, 16


class Block(nn.Module):
    """A stream of linear layers between a table and a head, with one oddity."""

    def __init__(self, oddity: str, rows: int = ROWS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.oddity = oddity
        self.table = nn.Embedding(rows, hidden)
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)
        self.masked = nn.Linear(hidden, 2 * hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-6) for _ in range(2))
        self.head = nn.Linear(hidden, rows, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.uniform_(-1, 1, generator=generator).mul_(weight.shape[-1] ** -0.5)
                if "norms" in name:
                    weight.add_(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        normed = self.norms[0](x)
        wide = self.up(normed)
        if self.oddity == "mask":
            wide = torch.where((mask == 0).unsqueeze(-1), self.masked(normed), wide)
        x = x + self.down(wide.relu())
        logits = self.head(self.norms[1](x))
        if self.oddity == "all nan":
            return (logits - 1e9).log()
        if self.oddity == "half nan":
            return logits.log()
        if self.oddity == "column":
            return torch.cat([torch.full_like(logits[..., :1], 1e9), logits], -1)
        return logits


@cache
def program(oddity: str, rows: int = ROWS, hidden: int = HIDDEN) -> ExportedProgram:
    args = (torch.arange(12).view(2, 6) % 9, torch.ones(2, 6, dtype=torch.long))
    with torch.no_grad():
        return torch.export.export(Block(oddity, rows, hidden).eval(), args)


def rows_kept(first: int) -> Patch:
    """Rows of a table from ``first`` on stay in the old basis."""

    def patch(m: pytest.MonkeyPatch) -> None:
        real = ProgramEditor.queue

        def queue(self: ProgramEditor, node: Any, step: Any, mixes: Any = None) -> None:
            def partly(tensor: Tensor) -> Tensor:
                old = tensor[first:].clone()
                result = step(tensor).clone()
                result[first:] = old
                return result

            table = self.fqn(node) == "table.weight"
            real(self, node, partly if table else step, None if table else mixes)

        m.setattr(ProgramEditor, "queue", queue)

    return patch


CASES: dict[str, tuple[str, Patch]] = {
    "a reader that only padding passes": ("mask", queue_unless(lambda f: f == "masked.weight")),
    "an output of NaN alone": ("all nan", queue_unless(lambda f: f == "up.weight")),
    "an output half of NaN": ("half nan", queue_unless(lambda f: f == "up.weight")),
    "a column of 1e9 beside it": ("column", rotation_with(unscaled)),
    "a reader beside a column of 1e9": ("column", queue_unless(lambda f: f == "up.weight")),
    "ids above the example's": ("", rows_kept(9)),
    "ids of the upper half": ("", rows_kept(ROWS // 2)),
    "the last id alone": ("", rows_kept(ROWS - 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_certificate_catches(case: str) -> None:
    oddity, patch = CASES[case]
    if oddity != "all nan":
        certificate = spinpass.rotate(program(oddity)).certificate
        assert certificate is not None and certificate.ok
    with mutated(patch), pytest.raises(VerificationError, match="not equivalent"):
        spinpass.transform(program(oddity))


def test_above_fifty_million_parameters_with_default_settings() -> None:
    """Nothing is asked for, and the certificate is made all the same."""
    large = program("", 25_000, 1024)
    assert sum(t.numel() for t in large.state_dict.values()) > 50_000_000
    blamed = pytest.raises(VerificationError, match="not equivalent.*the space to blame is R1")
    with mutated(rows_kept(24_999), blamed=True), blamed:
        spinpass.transform(large, spinpass.RotationConfig(rotations=("R1",), form="offline"))

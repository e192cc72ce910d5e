"""What planning costs: ``python -m benchmarks.planning [PROGRAM.pt2]``.

Two tables. The first plans a real program (without an argument: SmolLM2-135M from its package) with the checks on the
spot and without them, in turns, and shows the median of the ratio of CPU times. The second plans stacks of 64 and 256
layers, whose norm scales fold, and whose norm scales have to stay because more than linear layers read the norms: both
depths in turns, medians of the CPU times and of their ratio.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.export import ExportedProgram

import spinpass
from benchmarks.transform import packaged_program
from spinpass.analysis import Checked, SpotCheck
from spinpass.cli.screen import Screen
from spinpass.formats import load_program

HIDDEN = 32
DEPTHS = (64, 256)
app = typer.Typer(add_completion=False)


class Stack(nn.Module):
    """A residual stream; with ``stays`` each norm is read by a mean over its channels as well."""

    def __init__(self, layers: int, *, stays: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, HIDDEN)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 48, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(48, HIDDEN, bias=False) for _ in range(layers))
        self.head = nn.Linear(HIDDEN, 20)
        self.stays = stays
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (batch, length, 20) of token ids."""
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.up, self.down):
            h = norm(x)
            h = h + h.abs().mean(-1, keepdim=True) if self.stays else h
            x = x + down(torch.relu(up(h)))
        logits: Tensor = self.head(x)
        return logits


@app.command()
def main(
    program: Annotated[Path | None, typer.Argument(help="An exported program; SmolLM2-135M if none is given.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds, in which both are run in turns.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure both."""
    torch.set_num_threads(1)
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        path = program or packaged_program(steps)
        steps.start("checks on the spot")
        checked = _ratios(load_program(path), repeats)
        growth: dict[str, tuple[float, float, float]] = {}
        for stays in (False, True):
            name = "stay" if stays else "fold"
            steps.start(f"{' and '.join(map(str, DEPTHS))} layers whose scales {name}")
            growth[name] = _growth(stays, repeats)
    found = {"with_checks": checked, "growth": growth, "depths": DEPTHS}
    if as_json:
        screen.document(found)
        return
    table = Table("CPU seconds", *(f"{depth} layers" for depth in DEPTHS), "ratio", title="Planning")
    for name, (less, more, ratio) in growth.items():
        table.add_row(f"scales {name}", f"{less:.2f}", f"{more:.2f}", f"{ratio:.2f}")
    table.caption = f"{path.name}: planning with checks on the spot ÷ without, median of {repeats}: {checked:.2f}"
    screen.show(table)


def _ratios(program: ExportedProgram, repeats: int) -> float:
    """Return the median of (with the checks) ÷ (without)."""
    spinpass.plan(program)  # what the first call alone pays for
    ratios = []
    for _ in range(repeats):
        with _unchecked():
            without = _seconds(lambda: spinpass.plan(program))
        ratios.append(_seconds(lambda: spinpass.plan(program)) / without)
    return statistics.median(ratios)


def _growth(stays: bool, repeats: int) -> tuple[float, float, float]:
    """Return the median CPU times at both depths, and the median of their ratios."""
    stacks = [Stack(depth, stays=stays).eval() for depth in DEPTHS]
    programs = [torch.export.export(stack, (torch.arange(6).view(2, 3),)) for stack in stacks]
    rounds = [[_seconds(lambda made=made: spinpass.plan(made)) for made in programs] for _ in range(repeats)]  # type: ignore[misc]
    less, more = map(statistics.median, zip(*rounds))
    return less, more, statistics.median(after / before for before, after in rounds)


@contextmanager
def _unchecked() -> Iterator[None]:
    with mock.patch.object(SpotCheck, "__call__", lambda self, space: Checked(None, ())):
        yield


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()  # of what was run before
    began = time.process_time()
    run()
    return time.process_time() - began


if __name__ == "__main__":
    app()

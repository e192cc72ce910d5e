"""Whether the cost of a layer grows with the number of layers: ``python -m benchmarks.depth --layers 8,24,80``.

    decoders of tiny width, with random weights  ->  spinpass export  ->  CPU seconds by step and layer

Each export runs in a process of its own, one thread. What a layer costs is told by the difference between two depths,
in which what every run takes, imports and texts, cancels. Where nothing grows faster than the layers do, it is the same
for each pair.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.imports import ROOT
from benchmarks.memory import Shape, checkpoint
from spinpass.cli.screen import Screen
from spinpass.progress import Progress, Silent

KINDS: dict[str, dict[str, Any]] = {"bits 16": {"bits": 16}, "w4g128": {"quantize": "w4g128-rtn"}}
_WORKER = "import sys; from benchmarks.depth import exported; exported(*sys.argv[1:])"


class CpuSteps(Silent):
    """Steps whose CPU seconds are kept, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: dict[str, float] = {}
        self._now, self._since = "before", time.process_time()

    def start(self, name: str, /, unit: str = "") -> Progress:
        """See :meth:`spinpass.progress.Steps.start`."""
        self._end()
        self._now = name
        return super().start(name, unit)

    def finish(self) -> None:
        """See :meth:`spinpass.progress.Steps.finish`."""
        self._end()
        super().finish()

    def _end(self) -> None:
        now = time.process_time()
        self.cpu[self._now] = self.cpu.get(self._now, 0.0) + now - self._since
        self._since = now


def main(
    layers: Annotated[str, typer.Option(help="Numbers of layers, separated by commas.")] = "8,24,80",
    kinds: Annotated[str, typer.Option(help="Kinds of exports, separated by commas.")] = ",".join(KINDS),
    out: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path("out/memory"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the checkpoints, export, and print."""
    screen, found = Screen(as_json=as_json), dict[str, dict[int, dict[str, float]]]()
    depths = sorted(int(count) for count in layers.split(","))
    with screen.steps() as steps:
        for kind in kinds.split(","):
            for count in depths:
                steps.start(f"{kind.strip()}, {count} layers")
                found.setdefault(kind.strip(), {})[count] = _measured(kind.strip(), count, out.resolve())
                screen.note(json.dumps({"kind": kind.strip(), "layers": count, "cpu": found[kind.strip()][count]}))
    if as_json:
        screen.document(found)
        return
    for kind, by_depth in found.items():
        screen.show(_table(kind, by_depth, depths))


def _table(kind: str, by_depth: dict[int, dict[str, float]], depths: list[int]) -> Table:
    pairs = list(pairwise(depths))
    columns = [*(f"{n} layers, s" for n in depths), *(f"ms a layer, {a} to {b}" for a, b in pairs)]
    table = Table("step", *columns, title=kind)
    names = list(dict.fromkeys(name for row in by_depth.values() for name in row))
    for name in [*names, "all"]:
        spent = [sum(row.values()) if name == "all" else row.get(name, 0.0) for row in by_depth.values()]
        each = [1e3 * (y - x) / (b - a) for (a, b), (x, y) in zip(pairs, pairwise(spent), strict=True)]
        table.add_row(name, *(f"{s:.2f}" for s in spent), *(f"{ms:.0f}" for ms in each))
    return table


def _measured(kind: str, count: int, out: Path) -> dict[str, float]:
    model = out / f"deep-{count}"
    checkpoint(Shape(128, count, 256, 4, 2, 512, 32), model)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with TemporaryDirectory(dir=out) as place:
        command = [sys.executable, "-c", _WORKER, kind, str(model), str(Path(place, "out"))]
        made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{kind}, {count} layers, failed:\n{made.stderr[-2000:]}")
    found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    return found


def exported(kind: str, model: str, out: str) -> None:
    """Export in this process, and print the CPU seconds of every step."""
    from spinpass.folders import export

    steps = CpuSteps()
    export(model, out, steps=steps, **KINDS[kind])
    print(json.dumps(steps.cpu))


if __name__ == "__main__":
    typer.run(main)

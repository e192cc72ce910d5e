"""What calibration costs: ``python -m benchmarks.gptq [PROGRAM.pt2]``.

Every linear layer of a rotated program is rounded by GPTQ on calibration windows drawn at random (the cost does not
depend on the text). Shown are CPU and wall-clock seconds, and the peak of memory above the loaded program, as a
multiple of its weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spinpass
from benchmarks.transform import MEGABYTE, memory, packaged_program, reset_peak
from spinpass.cli.screen import Screen
from spinpass.evaluation import ProgramScorer
from spinpass.formats import load_program
from spinpass.quantization import quantize


def main(
    program: Annotated[Path | None, typer.Argument(help="An exported program; SmolLM2-135M if none is given.")] = None,
    scheme: Annotated[str, typer.Option(help="What to quantize.")] = "w4-gptq",
    windows: Annotated[int, typer.Option("--samples", help="Windows to calibrate on.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Rotate, quantize, and print what that took."""
    torch.set_num_threads(threads)
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        path = program or packaged_program(steps)
        steps.start("rotate")
        rotated = spinpass.transform(load_program(path), spinpass.RotationConfig(form="online", verify=False))
        figures = measured(rotated, scheme, windows, length, steps.start(f"quantize, {scheme}"))
    if as_json:
        screen.document({"program": str(path), "scheme": scheme, "threads": threads} | figures)
    table = Table("CPU s", "wall s", "peak MB", "peak ÷ weights", title=f"{scheme}, {windows} windows of {length}")
    peak, weights = figures["peak_bytes"], figures["weight_bytes"]
    times = f"{figures['cpu_seconds']:.0f}", f"{figures['wall_seconds']:.0f}"
    table.add_row(*times, f"{peak / MEGABYTE:.0f}", f"{peak / weights:.2f}")
    screen.show(table)


def measured(
    program: torch.export.ExportedProgram, scheme: str, windows: int, length: int, progress: Any
) -> dict[str, float]:
    """Call ``quantize`` once; returns CPU and wall-clock seconds, and bytes."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1000, (windows, length), generator=generator)
    inputs = [ProgramScorer(program).inputs(ids) for ids in drawn.tolist()]
    distinct = {t.data_ptr(): t.nbytes for t in program.state_dict.values()}
    loaded = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    quantize(program, scheme, inputs, progress=progress)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "peak_bytes": memory("VmHWM") - loaded,
        "weight_bytes": sum(distinct.values()),
    }


if __name__ == "__main__":
    typer.run(main)

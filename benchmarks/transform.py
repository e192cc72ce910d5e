"""What planning and transforming cost: ``python benchmarks/transform.py [PROGRAM.pt2]``.

Three tables. The first takes a real program (without an argument: SmolLM2-135M from its package, exported with its KV
cache) and shows CPU seconds and the peak of memory above what was loaded, as a multiple of the weights' bytes. The
second takes decoders of 8 to 64 layers and shows how the time grows, with a straight line fitted to it. The third
does so for the plan of a mixture of experts whose weights are gathered for each token, which needs transformers. Every
figure comes from a process of its own, in which the program is loaded or exported first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spinpass
from spinpass.cli.screen import Screen
from spinpass.folders import packaged_model
from spinpass.formats import load_program, save_program
from spinpass.loading import load_model
from spinpass.progress import Steps

LAYERS = (8, 16, 32, 64)
EXPERT_LAYERS = (2, 4, 8)
EXPERTS = "experts:"  # before a number of layers
STAGES = ("plan", "transform")
MEGABYTE = 2**20
app = typer.Typer(add_completion=False)


@app.command()
def main(
    program: Annotated[Path | None, typer.Argument(help="An exported program; SmolLM2-135M if none is given.")] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads for the real program.")] = "1,2",
    layers: Annotated[str, typer.Option(help="Depths of the synthetic decoders.")] = ",".join(map(str, LAYERS)),
    expert_layers: Annotated[str, typer.Option(help="Depths of the mixtures of experts.")] = ",".join(
        map(str, EXPERT_LAYERS)
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure plan and transform."""
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        path = program or packaged_program(steps)
        real = [measured(steps, stage, str(path), int(n)) for n in threads.split(",") for stage in STAGES]
        depths = [int(n) for n in layers.split(",")]
        growth = {stage: [measured(steps, stage, str(depth), 1) for depth in depths] for stage in STAGES}
        mixtures = [int(n) for n in expert_layers.split(",")]
        experts = {"plan": [measured(steps, "plan", f"{EXPERTS}{depth}", 1) for depth in mixtures]}
    fits = {stage: line(depths, [row["cpu_seconds"] for row in rows]) for stage, rows in growth.items()}
    if as_json:
        found = {"real": real, "growth": growth, "fits": fits, "experts": experts}
        screen.document({"program": str(path), **found})
        return
    screen.show(real_table(path.name, real), growth_table(depths, growth, fits))
    fitted = {stage: line(mixtures, [row["cpu_seconds"] for row in rows]) for stage, rows in experts.items()}
    screen.show(growth_table(mixtures, experts, fitted, "CPU seconds over depth, a mixture of 8 gathered experts"))


def packaged_program(steps: Steps) -> Path:
    """The packaged model as a program with its cache, exported once and kept under ``out/``."""
    path = Path("out/benchmarks/smollm2-135m.pt2")
    if not path.is_file():
        save_program(load_model(packaged_model(), progress=steps.begin).program, path)
    return path


def measured(steps: Steps, stage: str, what: str, threads: int) -> dict[str, Any]:
    """Take the figures of one stage from a fresh process of this script."""
    steps.start(f"{stage} {Path(what).name}, {threads} threads")
    command = [sys.executable, __file__, stage, what, str(threads)]
    # Threads that wait in a loop count as busy; beside other programs that is most of what would be measured.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure(stage: str, what: str, threads: int) -> dict[str, Any]:
    """Measure ``plan`` or ``transform`` in this process; ``what`` is a file or a number of layers."""
    torch.set_num_threads(threads)
    depth = what.removeprefix(EXPERTS)
    make = mixture if what.startswith(EXPERTS) else synthetic
    program = make(int(depth)) if depth.isdigit() else load_program(what)
    distinct = {t.data_ptr(): t for t in program.state_dict.values()}  # tied weights are loaded as views
    weights = sum(t.numel() * t.element_size() for t in distinct.values())
    config = spinpass.RotationConfig(verify=False)
    run = spinpass.plan if stage == "plan" else spinpass.transform
    if depth.isdigit():  # what the first call alone pays for must not pass for growth
        run(make(2), config)
    loaded = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    run(program, config)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = memory("VmHWM") - loaded
    size = {"nodes": len(program.graph.nodes), "weight_bytes": weights, "peak_bytes": peak}
    return {"stage": stage, "threads": threads, "cpu_seconds": cpu, "wall_seconds": wall} | size


def synthetic(layers: int) -> torch.export.ExportedProgram:
    """Export the decoder of the examples with so many layers."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
    from decoder import VOCABULARY, Decoder

    return torch.export.export(Decoder(layers).eval(), (torch.randint(VOCABULARY, (2, 7)),))


def mixture(layers: int) -> torch.export.ExportedProgram:
    """Export a mixture of eight experts with so many layers, every token's weights gathered."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.exporters import DynamoConfig, DynamoExporter
    from transformers.exporters.utils import decompose_for_generation

    config = Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=layers, intermediate_size=128, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=256,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("batched_mm")
    ids = torch.arange(32).reshape(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decode, given = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    made: torch.export.ExportedProgram = DynamoExporter().export(decode, given, DynamoConfig(dynamic=True)).program
    return made


def reset_peak() -> int:
    """Let the kernel forget the peak of memory so far; returns the resident bytes now (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


def memory(what: str) -> int:
    """Read a line of /proc/self/status, in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def line(depths: list[int], seconds: list[float]) -> dict[str, float]:
    """Fit by least squares, seconds = start + per_layer · layers, and the share of the variance it explains."""
    x, y = torch.tensor(depths, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    start = float(y.mean() - slope * x.mean())
    rest, spread = float(((y - start - slope * x) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return {"start": start, "per_layer": slope, "r_squared": 1 - rest / spread}


def real_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """A table of CPU and memory of the real program."""
    weights = rows[0]["weight_bytes"]
    title = f"{name}: {rows[0]['nodes']:,} nodes, {weights / MEGABYTE:.0f} MB of weights"
    table = Table("stage", "threads", "CPU s", "wall s", "peak MB", "peak / weights", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for r in rows:
        times = (f"{r['cpu_seconds']:.2f}", f"{r['wall_seconds']:.2f}")
        peak = (f"{r['peak_bytes'] / MEGABYTE:.0f}", f"{r['peak_bytes'] / weights:.2f}")
        table.add_row(r["stage"], str(r["threads"]), *times, *peak)
    return table


def growth_table(
    depths: list[int],
    growth: dict[str, list[dict[str, Any]]],
    fits: dict[str, dict[str, float]],
    title: str = "CPU seconds over depth, one thread",
) -> Table:
    """A table of CPU seconds over depth, and the fitted line."""
    headings = ("stage", *(f"{depth} layers" for depth in depths), "ms / layer", "R²")
    table = Table(*headings, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, rows in growth.items():
        fit = fits[stage]
        cells = [f"{row['cpu_seconds']:.2f}" for row in rows]
        table.add_row(stage, *cells, f"{1e3 * fit['per_layer']:.1f}", f"{fit['r_squared']:.4f}")
    return table


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in STAGES:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        app()

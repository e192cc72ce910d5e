"""What an export costs beside transformers' own: ``python -m benchmarks.export_cost``.

``spinpass export MODEL OUT --int4``, which is one graph for prompts and tokens, rotated, fused, certified and packed to
4 bits, against ``OnnxExporter.export_for_generation``, which is two graphs in float32. Both start from the same model,
each in processes of its own, in turns. Shown are CPU seconds of a whole process, loading included, and its peak of
memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.transform import MEGABYTE
from spinpass.cli.screen import Screen
from spinpass.folders import packaged_model

OURS, THEIRS = "spinpass export --int4", "transformers OnnxExporter"
_THEIR_EXPORT = """
import sys
import torch
from transformers.exporters import OnnxConfig, OnnxExporter
from benchmarks.consumers.expected import original_model

model, _ = original_model(sys.argv[1])
ids = torch.arange(16).reshape(2, 8)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
exported = OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))
exported.save_pretrained(sys.argv[2])
"""


def main(
    model: Annotated[str, typer.Option(help="Folder, hub name or GGUF file; the demo's model if none.")] = "",
    repeats: Annotated[int, typer.Option(help="Exports of each kind.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export in turns and compare."""
    screen = Screen(as_json=as_json)
    name = model or packaged_model()
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    with screen.steps() as steps, TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "spinpass", "export", name, str(Path(folder, "ours")), "--int4"]
        theirs = [sys.executable, "-c", _THEIR_EXPORT, name, str(Path(folder, "theirs"))]
        for _ in range(repeats):
            for kind, command in ((OURS, ours), (THEIRS, theirs)):
                steps.start(kind)
                runs[kind].append(_measured(command))
    medians = {kind: {key: median(run[key] for run in each) for key in each[0]} for kind, each in runs.items()}
    ratio = medians[OURS]["cpu_seconds"] / medians[THEIRS]["cpu_seconds"]
    if as_json:
        screen.document({"model": name, "runs": runs, "ratio": ratio})
    table = Table("", "CPU s", "wall s", "peak MB", title=f"One export; CPU time {ratio:.2f} of transformers'")
    for kind, figures in medians.items():
        peak = f"{figures['peak_bytes'] / MEGABYTE:.0f}"
        table.add_row(kind, f"{figures['cpu_seconds']:.0f}", f"{figures['wall_seconds']:.0f}", peak)
    screen.show(table)


def _measured(command: list[str]) -> dict[str, float]:
    """Run one process with one thread for each library; returns its seconds and bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    measuring = (
        "import json, resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))"
    )
    started = time.perf_counter()
    outer = [sys.executable, "-c", measuring, *command]
    done = subprocess.run(outer, capture_output=True, text=True, env=environment, check=False)
    found: Any = json.loads(done.stdout or "[1, 0, 0]")
    if found[0]:
        raise SystemExit(f"{command[:4]} failed:\n{done.stderr}")
    return {"cpu_seconds": found[1], "peak_bytes": found[2], "wall_seconds": time.perf_counter() - started}


if __name__ == "__main__":
    typer.run(main)

"""What a folder is worth for its size, beside llama.cpp on the same weights: ``python -m benchmarks.yardstick``.

    off-grid weights  ->  spinpass export, llama.cpp's kinds  ->  MB, perplexity ÷ float on texts of several sources

The weights are those of :mod:`benchmarks.offgrid`, so that no kind of block is at home on them, or with ``--gguf FILE
--spread 1`` those of a file as they are, for example one of :mod:`benchmarks.trained`. Every row is a command that
anyone can give; the file that it writes is scored, in ONNX Runtime or in llama.cpp. Nothing here is calibrated on what
is reported: ``spinpass export`` reads the text of its package, and scored are those of :mod:`benchmarks.texts` and what
``--text NAME=FILE`` names. ``--python`` names an interpreter with llama-cpp-python, see
:mod:`benchmarks.llama_cpp`; without one its rows are left out, and the table says so. CPU minutes and peak memory are
those of the whole command, certificate, trial and card included.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.floats import Windows, off_the_grid, scored_floats
from benchmarks.imports import ROOT
from benchmarks.llama_cpp import Worker
from benchmarks.offgrid import SPREADS
from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.folders import MEASURED, measured, recipe_of, weight_count
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder

ROWS = ("4", "4/plain", "8", "3", "2")
KINDS = ("Q4_0", "Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class Row:
    """One file: its size, its losses by text, and what making it took."""

    name: str
    bytes: int
    losses: Mapping[str, evaluation.Perplexity]
    cpu_minutes: float | None = None
    peak_bytes: int | None = None

    def to_dict(self, reference: Mapping[str, evaluation.Perplexity], weights: int) -> dict[str, Any]:
        """The JSON-able form: ratios to the reference by text, their mean and the worst."""
        changes = {text: evaluation.change(reference[text], found) for text, found in self.losses.items()}
        ratios = {text: math.exp(change.mean) for text, change in changes.items()}
        errors = {text: ratios[text] * change.error for text, change in changes.items()}
        about = {"row": self.name, "bytes": self.bytes, "bits_per_weight": 8 * self.bytes / weights}
        made = {"cpu_minutes": self.cpu_minutes, "peak_bytes": self.peak_bytes}
        summary = {"mean": statistics.fmean(ratios.values()), "worst": max(ratios.values())}
        return about | made | {"ratios": ratios, "errors": errors} | summary


def main(
    spread: Annotated[float, typer.Option(help="Of the off-grid weights; 1 keeps those of the file.")] = SPREADS[-1],
    gguf: Annotated[Path | None, typer.Option(help="The model, of the Llama family; the demo's if none.")] = None,
    rows: Annotated[str, typer.Option(help="BITS/RECIPE/OPTIONS, by commas: 4,4//--learn full")] = ",".join(ROWS),
    kinds: Annotated[str, typer.Option(help="Kinds of llama.cpp, separated by commas.")] = ",".join(KINDS),
    python: Annotated[str, typer.Option(help="Interpreter that has llama-cpp-python.")] = "",
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE to score on as well; may be repeated.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each window.")] = 512,
    out: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("out/yardstick"),
    save: Annotated[bool, typer.Option("--save", help="Keep the recipes' rows for spinpass schemes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    screen = Screen(as_json=as_json)
    worker = Worker(python) if python else None
    with screen.steps() as steps:
        source = Path(off_the_grid(out, gguf, spread, steps))
        floats = scored_floats(str(source), text or (), length, windows, steps)
        cut, reference, weights = floats.cut, floats.losses, weight_count(floats.loaded.program)
        del floats  # its program takes memory that the exports need
        found = [_ours(row.strip(), source, out, cut, steps) for row in rows.split(",") if row.strip()]
        if worker is not None:
            found += [_llama(kind.strip(), source, worker, cut, steps) for kind in kinds.split(",") if kind.strip()]
    listed = [row.to_dict(reference, weights) for row in found]
    if save:
        model = f"SmolLM2-135M off the grid, spread {spread}" if gguf is None else gguf.name
        MEASURED.write_text(json.dumps(_kept(listed, model, list(cut)), indent=2) + "\n", encoding="utf-8")
    if as_json:
        plain = {name: each.to_dict() for name, each in reference.items()}
        screen.document({"spread": spread, "windows": windows, "length": length, "float": plain, "rows": listed})
    left = "" if worker else "; llama.cpp left out: name an interpreter with --python"
    screen.show(_table(listed, f"spread {spread}; {windows} windows of {length} tokens of each text{left}"))


def _kept(rows: Sequence[Mapping[str, Any]], model: str, texts: Sequence[str]) -> dict[str, Any]:
    """What :func:`spinpass.folders.measured` returns: the rows by ``--recipe auto``, beside those that it has."""
    about = f"{model}, benchmarks.yardstick, texts {', '.join(texts)}"
    before = measured()
    found = dict(before["rows"]) if before["about"] == about else {}
    for row in rows:
        bits = row["row"].removeprefix("spinpass, --bits ")
        if bits.isdecimal():
            scheme = recipe_of("auto", int(bits), "onnx").scheme
            figures = {key: round(row[key], 4) for key in ("mean", "worst")}
            found[bits] = {"scheme": scheme, "mb": round(row["bytes"] / 1e6, 1), **figures}
    return {"about": about, "rows": found}


def _ours(row: str, source: Path, out: Path, cut: Mapping[str, Windows], steps: Steps) -> Row:
    """Run ``spinpass export`` and score what it writes."""
    bits, recipe, options = (*row.split("/", 2), "", "")[:3]
    name = f"--bits {bits}" + (f" --recipe {recipe}" if recipe else "") + (f" {options}" if options else "")
    folder = out / "-".join([source.stem, bits, recipe or "auto", *options.replace("-", "").split()])
    steps.start(f"spinpass export {name}")
    command = [sys.executable, "-m", "spinpass", "export", str(source.resolve()), str(folder.resolve()), *name.split()]
    started = subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    said = started.stdout.read()
    _, status, usage = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(f"spinpass export {name} failed: {json.loads(said or '{}').get('message', status)}")
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    decoder = OrtDecoder(folder, threads=1)
    losses = {n: evaluation.perplexity(decoder, w, steps.start(f"score {name}, {n}")) for n, w in cut.items()}
    return Row(f"spinpass, {name}", size, losses, (usage.ru_utime + usage.ru_stime) / 60, usage.ru_maxrss * 1024)


def _llama(kind: str, source: Path, worker: Worker, cut: Mapping[str, Windows], steps: Steps) -> Row:
    """Have llama.cpp round the weights, and score its file in it."""
    with TemporaryDirectory() as folder:
        steps.start(f"llama.cpp, {kind}")
        target = Path(folder, f"{kind}.gguf")
        worker.ask("requantize", source=str(source.resolve()), target=str(target), kind=kind)
        losses = {}
        for name, each in cut.items():
            found = worker.ask("losses", gguf=str(target), windows=each, threads=1)
            losses[name] = evaluation.Perplexity(tuple(found), sum(len(ids) - 1 for ids in each))
        return Row(f"llama.cpp, {kind}", target.stat().st_size, losses)


def _table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    names = list(rows[0]["ratios"]) if rows else []
    table = Table("", "MB", "bits/weight", *names, "mean", "worst", "CPU minutes", "peak GB", title_justify="left")
    table.title, table.caption, table.caption_justify = "Perplexity ÷ float", caption, "left"
    for row in rows:
        cells = [f"{row['ratios'][t]:.4f} ± {row['errors'][t]:.4f}" for t in names]
        made = ["", ""]
        if row["cpu_minutes"] is not None:
            made = [f"{row['cpu_minutes']:.1f}", f"{row['peak_bytes'] / 1e9:.1f}"]
        size = (f"{row['bytes'] / 1e6:.1f}", f"{row['bits_per_weight']:.2f}")
        table.add_row(row["row"], *size, *cells, f"{row['mean']:.4f}", f"{row['worst']:.4f}", *made)
    return table


if __name__ == "__main__":
    typer.run(main)

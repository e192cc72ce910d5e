"""What rotation costs at run time, in ONNX Runtime: ``python -m benchmarks.speed``.

One model, exported side by side: with 4-bit weights (``MatMulNBits``, as ``spinpass export --int4`` writes them),
original and rotated in three ways, and in float32 with and without ONNX Runtime's own operators for attention and
norms. Measured are the prefill of a prompt from an empty cache and the single tokens decoded on top of it. In every
round each model is loaded anew, so that no model keeps a lucky place in memory, in an order drawn anew. With one thread
the clock is CPU time of the process, which other programs on the machine stretch little; with more it is wall-clock
time.

Ratios are speeds (above 1: faster), taken within every round; shown is their median over rounds, with the quartiles.
The original model in 4 bits takes part twice: how far its second part is from 1 is what the measurement cannot resolve.

``8b-layer`` is one Llama layer of the shape of an 8B model (``--layers`` for more) with random weights and a small
vocabulary, so that the layer is what is measured. ``--levels`` and ``--blocks`` add a table of 4-bit weights without
rotation against float32; ``--transformers`` adds the decoding graph that transformers' own ``OnnxExporter`` writes with
``ort_fusions="cpu"``.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

import spinpass
from benchmarks.consumers.expected import original_model
from benchmarks.timing import PHASES, Contender, OrtContender, Work, cells, compared, measured
from spinpass.cli.screen import Screen
from spinpass.config import RotationConfig
from spinpass.evaluation import ProgramScorer
from spinpass.execution import run
from spinpass.exporters import cache_names, onnx
from spinpass.exporters.onnx import quantize_4bit
from spinpass.folders import packaged_model
from spinpass.loading import load_model
from spinpass.passes import last_token
from spinpass.progress import Steps

BASE, AGAIN, LAST, FLOAT, UNFUSED = "4-bit", "4-bit, again", "4-bit, --last-logits", "fp32", "fp32, unfused"
TRANSFORMERS = "fp32, transformers"
ROTATED = {
    "4-bit, R1+R2 offline": RotationConfig(rotations=("R1", "R2"), form="offline", verify=False),
    "4-bit, R1 offline, R2–R4": RotationConfig(form="offline", verify=False),
    "4-bit, R1 online, R2–R4": RotationConfig(form="online", verify=False),
}
PAIRS = {
    "4-bit ÷ fp32": (BASE, FLOAT),
    "fused ÷ unfused": (FLOAT, UNFUSED),
    "fp32 ÷ transformers' export": (FLOAT, TRANSFORMERS),
}
LAYER = "8b-layer"


def main(
    model: Annotated[str, typer.Option(help=f"smollm2, {LAYER}, or a folder, hub name or GGUF file.")] = "smollm2",
    repeats: Annotated[int, typer.Option(help="Rounds that are measured.")] = 15,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    new: Annotated[int, typer.Option(help="Tokens decoded after it, one at a time.")] = 32,
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime.")] = 1,
    layers: Annotated[int, typer.Option(help=f"Of {LAYER}.")] = 1,
    levels: Annotated[str, typer.Option(help="accuracy_level in the second table, for example 0,1,4.")] = "",
    blocks: Annotated[str, typer.Option(help="Block sizes for the second table, for example 32,64,128.")] = "",
    transformers: Annotated[bool, typer.Option("--transformers", help="Also transformers' own export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    screen = Screen(as_json=as_json)
    work = Work(prompt, new, repeats, threads)
    with screen.steps() as steps, TemporaryDirectory() as name:
        out = Path(name)
        source = _source(model, layers, out, steps)
        program = load_model(source, progress=steps.begin).program
        made = _exported(program, out, steps)
        about = {"model": model, "flop_per_token": _flops(program)} | work.to_dict()
        del program
        contenders: dict[str, Contender] = {n: OrtContender(folder) for n, folder in made.files.items()}
        contenders[AGAIN] = contenders[BASE]
        if transformers:
            contenders[TRANSFORMERS] = OrtContender(_of_transformers(source, out, steps), reads_prompt=False)
        times = measured(contenders, work, steps.start("time"))
        grid = _grid(made.files[FLOAT], out, levels, blocks, work, steps) if levels or blocks else {}
    rows = {n: compared(times[n], times[BASE]) | made.about.get(n, {}) for n in times}
    pairs = {name: compared(times[a], times[b]) for name, (a, b) in PAIRS.items() if b in times}
    if as_json:
        screen.document(about | {"models": rows, "pairs": pairs, "grid": grid, "seconds": steps.seconds})
    screen.show(_table(rows, about, work), _pair_table(pairs), *([_grid_table(grid)] if grid else []))


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exports:
    """What was exported: folders by name, and what is known of each without running it."""

    files: dict[str, Path]
    about: dict[str, dict[str, Any]]


def _source(model: str, layers: int, out: Path, steps: Steps) -> str:
    """Make the model where that is needed; returns what load_model takes."""
    if model == "smollm2":
        return packaged_model()
    if model != LAYER:
        return model
    from transformers import LlamaConfig, LlamaForCausalLM

    steps.start("build")
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=512,
        rope_theta=5e5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out / LAYER)
    return str(out / LAYER)


def _exported(program: ExportedProgram, out: Path, steps: Steps) -> Exports:
    """Export every variant; the float files of rotated models are not kept."""
    made = Exports({}, {})

    def write(source: ExportedProgram, name: str, fuse: bool = True) -> Path:
        steps.start(f"write {name}")
        onnx.export(source, out / name, **cache_names(source), fuse=fuse, verify=False)
        return out / name

    def keep(name: str, folder: Path, flops: int = 0) -> None:
        made.files[name] = folder
        made.about[name] = {"bytes": sum(f.stat().st_size for f in folder.glob("*.onnx*")), "flop_added": flops}

    keep(FLOAT, write(program, FLOAT))
    keep(UNFUSED, write(program, UNFUSED, fuse=False))
    quantize_4bit(out / FLOAT, out / BASE)
    keep(BASE, out / BASE)
    made.about[AGAIN] = made.about[BASE]
    quantize_4bit(write(last_token(program), "last, fp32"), out / LAST)
    keep(LAST, out / LAST)
    for name, config in ROTATED.items():
        steps.start(f"rotate {name}")
        rotated = spinpass.rotate(program, config)
        folder = write(rotated.program, f"{name}, fp32")
        quantize_4bit(folder, out / name)
        for file in folder.iterdir():
            file.unlink()
        keep(name, out / name, rotated.plan.flops)
    return made


def _flops(program: ExportedProgram) -> int:
    """Count multiplications and additions in the matrix products of one token, from an empty cache."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(program, ProgramScorer(program).inputs([1]))
    return int(counter.get_total_flops())


def _of_transformers(source: str, out: Path, steps: Steps) -> Path:
    """Have transformers export and fuse the graph that decodes single tokens; returns its folder."""
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    steps.start("export with transformers")
    model, _ = original_model(source)
    ids = torch.arange(32).reshape(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stage, inputs = decompose_for_generation(model, inputs)["decode"]
    with redirect_stdout(sys.stderr):  # torch says there how far it is
        exported = OnnxExporter().export(stage, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))
    path = out / "transformers" / "model.onnx"
    path.parent.mkdir()
    OnnxExporter.save_program(exported.program, path)
    return path.parent


def _grid(source: Path, out: Path, levels: str, blocks: str, work: Work, steps: Steps) -> dict[str, Any]:
    """Time the original model in 4 bits at every accuracy level and block size, against float32."""
    contenders: dict[str, Contender] = {FLOAT: OrtContender(source)}
    steps.start("pack the grid")
    for level in map(int, (levels or "4").split(",")):
        for block in map(int, (blocks or "32").split(",")):
            name = f"level {level}, blocks of {block}"
            quantize_4bit(source, out / name, accuracy_level=level, block_size=block)
            contenders[name] = OrtContender(out / name)
    times = measured(contenders, work, steps.start("time the grid"))
    return {name: compared(each, times[FLOAT]) for name, each in times.items()}


# -- what is shown ---------------------------------------------------------------------------------------------------


def _table(rows: dict[str, Any], about: dict[str, Any], work: Work) -> Table:
    table = Table("", "MB", "FLOP/token added", "decode, ms", "speed ÷ 4-bit", "prefill, ms", "speed ÷ 4-bit")
    table.title, table.title_justify, table.caption_justify = f"Speed of {about['model']}", "left", "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        size = f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else ""
        added = row.get("flop_added", 0)
        flops = f"{added:,} ({added / about['flop_per_token']:.2%})" if added else ""
        table.add_row(name, size, flops, *(text for phase in PHASES for text in cells(row, phase)))
    table.caption = f"{work.about}; {about['flop_per_token']:,} FLOP per token"
    return table


def _pair_table(pairs: dict[str, Any]) -> Table:
    table = Table("speed", *PHASES, title="The original model in float32 and 4 bits", title_justify="left")
    for name, row in pairs.items():
        table.add_row(name, *(cells(row, phase)[1] for phase in PHASES))
    return table


def _grid_table(grid: dict[str, Any]) -> Table:
    table = Table("", "decode, ms", "speed ÷ fp32", "prefill, ms", "speed ÷ fp32", title_justify="left")
    table.title = "MatMulNBits, the original model"
    for name, row in grid.items():
        table.add_row(name, *(text for phase in PHASES for text in cells(row, phase)))
    return table


if __name__ == "__main__":
    typer.run(main)

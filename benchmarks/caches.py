"""What a cache of integers costs, rotated and not: ``python -m benchmarks.caches``.

    spinpass export --bits 16 --kv-cache int8|int4, with R2 and R3 and without  ->  perplexity ÷ that of a float cache

Scored is the written file in ONNX Runtime, which reads the text in pieces, so that all but the newest keys and values
come out of the cache. Weights stay in floats, so nothing but the cache differs. Beside them stands the quantizer's
``kv4``, with a scale for every token and head, which is simulated: no kernel of ONNX Runtime has that. The cache's
scales are of the text of the package, and scored are texts of other sources.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.offgrid import SPREADS, packaged_gguf, write
from benchmarks.texts import scored_texts
from spinpass import RotationConfig, evaluation
from spinpass.cli.screen import Screen
from spinpass.errors import VerificationError
from spinpass.evaluation import ProgramScorer, Scorer, token_ids
from spinpass.folders import export
from spinpass.loading import load_model
from spinpass.pipeline import transform
from spinpass.progress import Steps
from spinpass.quantization import quantize
from spinpass.runtime import OrtDecoder

WAYS = {"original": None, "rotated": RotationConfig(rotations=("R2", "R3"))}
KINDS = (None, "int8", "int4")
Windows = Mapping[int, list[list[int]]]  # by length


def main(
    lengths: Annotated[str, typer.Option(help="Tokens of a window, separated by commas.")] = "2048,4096",
    windows: Annotated[int, typer.Option(help="Windows of each length, of all texts together.")] = 4,
    spread: Annotated[float, typer.Option(help="Of the off-grid weights; 1 keeps those of the file.")] = SPREADS[-1],
    gguf: Annotated[Path | None, typer.Option(help="The model, of the Llama family; the demo's if none.")] = None,
    out: Annotated[Path, typer.Option(help="Where the models are kept.")] = Path("out/caches"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        source = write(gguf or packaged_gguf(), out / f"model-{spread}.gguf", spread)
        cut = _windows(source, [int(each) for each in lengths.split(",")], windows, steps)
        losses: dict[str, dict[int, evaluation.Perplexity]] = {}
        for way, config in WAYS.items():
            for kind in KINDS:
                folder = out / f"{way}-{kind}"
                name = f"{way}, {kind or 'float'}" + _made(source, folder, config, kind, steps)
                losses[name] = _scored(OrtDecoder(folder, threads=1), cut, name, steps)
            losses[f"{way}, kv4 simulated"] = _scored(_simulated(source, config, steps), cut, f"{way}, kv4", steps)
    rows = [_row(name, found, losses[f"{name.split(',')[0]}, float"]) for name, found in losses.items()]
    if as_json:
        screen.document({"spread": spread, "windows": windows, "rows": rows})
    screen.show(_table(rows))


def _made(source: Path, folder: Path, config: RotationConfig | None, kind: Any, steps: Steps) -> str:
    """Export; what the trial of the folder refuses is made without it, to be scored all the same. Returns a remark."""
    try:
        export(source, folder, config, bits=16, kv_cache=kind, steps=steps)
    except VerificationError:
        export(source, folder, config, bits=16, kv_cache=kind, certify=False, steps=steps)
        return " (refused by its trial)"
    return ""


def _windows(source: Path, lengths: Sequence[int], count: int, steps: Steps) -> Windows:
    loaded = load_model(str(source), cache=False, progress=steps.begin)
    assert loaded.companions is not None
    tokenize = token_ids(loaded.companions.tokenizer)
    texts = [tokenize(text) for text in scored_texts().values()]
    each = max(1, count // len(texts))
    return {length: [w for ids in texts for w in evaluation.windows(ids, length, each)] for length in lengths}


def _simulated(source: Path, config: RotationConfig | None, steps: Steps) -> ProgramScorer:
    program = load_model(str(source), cache=False, progress=steps.begin).program
    rotated = program if config is None else transform(program, config)
    return ProgramScorer(quantize(rotated, "kv4").program)


def _scored(scorer: Scorer, cut: Windows, name: str, steps: Steps) -> dict[int, evaluation.Perplexity]:
    return {n: evaluation.perplexity(scorer, each, steps.start(f"score {name}, {n}")) for n, each in cut.items()}


def _row(
    name: str, found: Mapping[int, evaluation.Perplexity], plain: Mapping[int, evaluation.Perplexity]
) -> dict[str, Any]:
    changes = {length: evaluation.change(plain[length], each) for length, each in found.items()}
    ratios = {length: math.exp(change.mean) for length, change in changes.items()}
    errors = {length: ratios[length] * change.error for length, change in changes.items()}
    return {"row": name, "ratios": ratios, "errors": errors, "mean": statistics.fmean(ratios.values())}


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("", *(f"{length:,} tokens" for length in rows[0]["ratios"]), title_justify="left")
    table.title = "Perplexity ÷ that of the same model with a cache of floats"
    for row in rows:
        table.add_row(row["row"], *(f"{r:.4f} ± {row['errors'][n]:.4f}" for n, r in row["ratios"].items()))
    return table


if __name__ == "__main__":
    typer.run(main)

"""What rotation buys: perplexity of quantized programs, original and rotated, over the same windows.

Every scheme is applied to the ``original`` model and to the model rotated: with R1 in the residual stream
(``offline``), at the inputs of the linear layers (``online``), or there and across heads at the output projections
(``online+heads``); ``tuned`` is what :func:`spinpass.tuning.tune` chooses on text between the calibration windows. All
are scored on the same windows; the ratio is to the perplexity of the unquantized model, its standard error that of the
paired difference. Schemes that begin with ``ort:`` are exported, packed and run by the integer kernels of ONNX Runtime;
the others are simulated in the graph (:mod:`spinpass.quantization`). Embedding and head stay as they are unless a
scheme names them. Finished cells are kept under ``out/accuracy`` and not measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from rich.table import Table

from benchmarks.grid import ORIGINAL, TUNED, UNQUANTIZED, VARIANTS, Cell, Grid
from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.evaluation import open_scorer
from spinpass.folders import packaged_model

SCHEMES = ("ort:w8-gptq-a8", "ort:w8-gptq-a8static", "ort:w4g128-gptq-a8-distill", "w4-asym-gptq-distill",
           "w4-asym-gptq-a8-kv4-distill", "a4-kv4", "w4-asym-gptq-a4-kv4-distill", "w4g32-gptq")  # fmt: skip
SHOWN = (ORIGINAL, "online+heads")  # unless told otherwise
DECISIVE = 16  # windows that tuning decides on


def main(
    model: Annotated[str, typer.Option(help="Folder, hub name or GGUF file; the demo's model if none.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; else the other help topics.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to score on; else every other topic of help().")] = None,
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(SCHEMES),
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)} and {TUNED}.")] = ",".join(SHOWN),
    windows: Annotated[int, typer.Option(help="Windows that are scored.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    calibration_windows: Annotated[int, typer.Option("--samples", help="Windows to calibrate on.")] = 16,
    out: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = Path("out/accuracy"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the grid and print it."""
    chosen = [s.strip() for s in variants.split(",")]
    unknown = sorted(set(chosen) - {*VARIANTS, TUNED})
    if unknown:
        listed = f"{', '.join(VARIANTS)}, {TUNED}"
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {listed}", param_hint="--variants")
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        name = model or packaged_model()
        opened = open_scorer(name, progress=steps.begin)
        if opened.program is None:
            raise typer.BadParameter(f"{name} is an ONNX model; name what it was made of", param_hint="--model")
        scored = evaluation.windows(opened.tokens(_text(text, 0)), length, windows)
        ids = opened.tokens(_text(calibration, 1))
        calibrating = evaluation.windows(ids, length, calibration_windows)
        rest = _between(ids, length, calibration_windows)
        held_out = evaluation.windows(rest, length, DECISIVE) if TUNED in chosen else []
        grid = Grid(opened.program, scored, calibrating, held_out, out, steps)
        base = grid.cell(UNQUANTIZED, ORIGINAL)
        wanted = [s.strip() for s in schemes.split(",")]
        cells = {scheme: {v: grid.cell(scheme, v) for v in chosen} for scheme in wanted}
    rows = {s: {v: _ratio(base, cell) | cell for v, cell in by.items()} for s, by in cells.items()}
    for by in rows.values():
        others = [cell for v, cell in by.items() if v != TUNED]
        if TUNED in by and others:
            best = min(others, key=lambda cell: cell["ratio"])
            by[TUNED]["over_best"] = _ratio(best, by[TUNED])
    if as_json:
        screen.document({"model": name, "windows": windows, "length": length, "unquantized": base, "schemes": rows})
    screen.show(_table(rows, chosen, windows, length, evaluation.Perplexity(tuple(base["losses"]), 0).value))


def _text(path: Path | None, half: int) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    names = sorted(topics)
    return "\n\n".join(topics[n] for n in names[half::2])


def _between(ids: Sequence[int], length: int, count: int) -> list[int]:
    """The tokens that :func:`evaluation.windows` leaves out."""
    step = len(ids) // count
    return [token for start in range(0, count * step, step) for token in ids[start + length : start + step]]


def _ratio(base: Cell, cell: Cell) -> dict[str, float]:
    """Perplexity over the unquantized one's, and its standard error over windows."""
    before, after = (evaluation.Perplexity(tuple(c["losses"]), 0) for c in (base, cell))
    change = evaluation.change(before, after)
    ratio = math.exp(change.mean)
    return {"ratio": ratio, "standard_error": ratio * change.error}


def _text_of(cell: Cell) -> str:
    text = _with_error(cell)
    if "over_best" in cell:
        text += f"\n{cell['chosen']}; ÷ best {_with_error(cell['over_best'])}"
    return text


def _with_error(figures: Cell) -> str:
    return f"{figures['ratio']:.4f} ± {figures['standard_error']:.4f}"


def _table(rows: dict[str, Cell], variants: list[str], windows: int, length: int, base: float) -> Table:
    table = Table("scheme", *variants, title="Perplexity ÷ unquantized", title_justify="left", caption_justify="left")
    for scheme, by in rows.items():
        table.add_row(scheme, *(_text_of(by[v]) for v in variants))
    table.caption = f"{windows} windows of {length} tokens; unquantized perplexity {base:.3f}"
    return table


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)

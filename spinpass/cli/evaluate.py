"""``spinpass eval``: how good a model is on text, alone or beside another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.evaluation import CALIBRATION_WINDOWS, EvalRequest, RotateAs

from .options import AsJson, CalibrationWindows, Model, Verbose
from .screen import screen_of
from .tables import comparison_table


def evaluate_command(
    ctx: typer.Context,
    model: Model,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score on; else Python's help texts.")] = None,
    dataset: Annotated[str, typer.Option(help="Or a dataset, NAME:CONFIG:SPLIT, say wikitext:wikitext-2-raw-v1.")] = "",
    against: Annotated[str, typer.Option(help="Another model, the one to compare with.")] = "",
    quantize: Annotated[str, typer.Option(help="Quantize MODEL first, say w4g128-a8-kv4; compared with itself.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Text for GPTQ and static ranges.")] = None,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    rotate_form: Annotated[RotateAs, typer.Option("--rotate", help="Rotate MODEL first, R1 in this form.")] = "no",
    file: Annotated[list[str] | None, typer.Option(help="An ONNX folder made of MODEL, beside it; repeatable.")] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer, where MODEL has none.")] = "",
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Perplexity of MODEL: a model folder, a hub name, GGUF, .pt2, or a folder that ONNX Runtime runs.

    With --against, --quantize, --rotate or --file also how it differs from the other or from what it was: the paired
    ratio of perplexities, how often both would say the same token, and the divergence of their predictions.
    """
    screen = screen_of(ctx, as_json, verbose)
    request = EvalRequest(
        model, text, dataset, against, quantize, calibration, calibration_windows, rotate=rotate_form,
        files=tuple(file or ()), windows=windows, length=length, tokenizer=tokenizer,
    )  # fmt: skip
    with screen.steps() as steps:
        found = request.run(steps)
    if as_json:
        screen.document({"model": model, "windows": windows, "length": length} | found.to_dict())
    else:
        screen.show(comparison_table(found.main, found.files, windows, length))

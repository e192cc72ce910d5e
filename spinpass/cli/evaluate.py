"""``spinpass eval``: how good a model is on text, alone or beside another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.evaluation import EvalRequest, Perplexity, RotateAs
from spinpass.formats import MANIFEST

from .options import AsJson, CalibrationWindows, Dequantize, DeviceOption, Model, TrustRemoteCode, Verbose
from .screen import screen_of
from .tables import comparison_table


def evaluate_command(
    ctx: typer.Context,
    model: Model,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score on; Python's help texts by default.")] = None,
    dataset: Annotated[
        str,
        typer.Option(help="Dataset to score on instead, NAME:CONFIG:SPLIT, for example wikitext:wikitext-2-raw-v1."),
    ] = "",
    against: Annotated[str, typer.Option(help="Another model, which MODEL is compared with.")] = "",
    quantize: Annotated[
        str, typer.Option(help="Quantize MODEL first, for example by w4g128-rtn-a8, and compare it with the original.")
    ] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text that GPTQ and static ranges calibrate on.", show_default="text of this package"),
    ] = None,
    calibration_windows: CalibrationWindows = None,
    rotate_form: Annotated[
        RotateAs,
        typer.Option("--rotate", help="Rotate MODEL first, R1 in this form, and compare it with the original."),
    ] = "no",
    file: Annotated[
        list[str] | None, typer.Option(help="ONNX folder made of MODEL, which is compared with it; may be repeated.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of windows to score.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of each window.")] = 512,
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer, where MODEL has none.")] = "",
    device: DeviceOption = "cpu",
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Measure the perplexity of MODEL: a model folder, a hub name, GGUF, .pt2, or a folder that ONNX Runtime runs.

    With --against, --quantize, --rotate or --file, two models are compared: the
    paired ratio of their perplexities, how often both find the same token the
    likeliest, and the divergence of their predictions. Nothing is written.

    Example: spinpass eval ./model --rotate online --quantize w4g128-rtn-a8
    """
    screen = screen_of(ctx, as_json, verbose)
    request = EvalRequest(
        model, text, dataset, against, quantize, calibration, calibration_windows, rotate=rotate_form,
        files=tuple(file or ()), windows=windows, length=length, tokenizer=tokenizer,
        dequantize=dequantize, trust_remote_code=trust_remote_code, device=device,
    )  # fmt: skip
    with screen.steps() as steps:
        found = request.run(steps)
    if as_json:
        screen.document({"model": model, "windows": windows, "length": length} | found.to_dict())
    else:
        scored = dataset or (str(text) if text is not None else "Python's help texts")
        screen.show(comparison_table(found.main, found.files, scored, windows, length))
        if isinstance(found.main, Perplexity) and not found.files and (Path(model) / MANIFEST).is_file():
            screen.show(f"for the ratio to the model that it was made of: spinpass eval MODEL --file {model}")

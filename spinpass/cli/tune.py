"""``spinpass tune``: which rotation is worth its cost under a scheme."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from spinpass.errors import ConfigError
from spinpass.evaluation import CALIBRATION_LENGTH, CALIBRATION_WINDOWS, SHIPPED_TEXT, check_windows
from spinpass.evaluation import windows as cut
from spinpass.folders import Known, Result, check_target, onnx_tools, write_folder
from spinpass.formats import drafted
from spinpass.graph import HOST, named_device, on_device
from spinpass.learning import Learning
from spinpass.loading import load_model
from spinpass.quantization import LEARNABLE, QuantizationConfig, check_kinds
from spinpass.tuning import candidates, tune

from .options import (
    AsJson,
    DecidingText,
    Dequantize,
    DeviceOption,
    Dtype,
    Force,
    Minutes,
    Model,
    TrustRemoteCode,
    Verbose,
)
from .screen import screen_of
from .tables import files_table, show_loading, tuning_table


def tune_command(
    ctx: typer.Context,
    model: Model,
    quantize: Annotated[str, typer.Option(help="Scheme to tune for, for example w4g128-gptq-a8.")],
    calibration: Annotated[
        Path, typer.Option(help="UTF-8 text that calibrates.", show_default="text of this package")
    ] = SHIPPED_TEXT,
    text: DecidingText = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the best model to, for ONNX Runtime.")] = None,
    calibration_windows: Annotated[
        int, typer.Option("--samples", help="Number of calibration windows, of --length tokens.")
    ] = CALIBRATION_WINDOWS,
    windows: Annotated[int, typer.Option(help="Number of windows to decide on.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of each window.")] = CALIBRATION_LENGTH,
    learn: Annotated[
        list[str] | None,
        typer.Option(
            help="Also try to learn these kinds of numbers on what was chosen, by commas, of "
            f"{', '.join(LEARNABLE)}; may be repeated.",
            metavar="KINDS",
        ),
    ] = None,
    minutes: Minutes = None,
    block_sizes: Annotated[str, typer.Option(help="Also try diagonal blocks of these sizes, for example 64,128.")] = "",
    dtype: Dtype = "float32",
    device: DeviceOption = "cpu",
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Measure what each way to rotate MODEL is worth under a scheme, and keep what helps, which may be nothing.

    With --learn the same is asked of what can be learned: scales,gains once and
    scales,offsets another time are two tries.

    With --out the best model is written, quantized, as spinpass export writes it;
    without --out nothing is.

    Example: spinpass tune ./model --quantize w4g128-gptq-a8
    """
    screen = screen_of(ctx, as_json, verbose)
    there = named_device(device)
    configs = candidates(_sizes(block_sizes))
    scheme = QuantizationConfig.parse(quantize)
    learning = [Learning(tuple(kind.strip() for kind in kinds.split(",")), minutes=minutes) for kinds in learn or ()]
    for settings in learning:
        check_kinds(settings.kinds)
    if minutes is not None and not learning:
        raise ConfigError(f"--minutes {minutes:g} is of learning: add --learn scales, or leave it out")
    check_windows(calibration_windows, calibration, length)
    if text is not None and text.resolve() == calibration.resolve():
        raise ConfigError(f"{text} calibrates and decides, which finds what fits that text: name two of them")
    if windows < 2:
        raise ConfigError(f"{windows} windows to decide on: choose 2 or more")
    if force and out is None:
        raise ConfigError("--force is about the folder that is written: add --out FOLDER, or leave it out")
    onnx = None if out is None else onnx_tools()
    if out is not None:
        check_target(out, model, force=force)
    known = Known.of(model, dequantize=dequantize, trust_remote_code=trust_remote_code)
    shown = cut(known.token_ids(calibration), length, calibration_windows)
    decisive = cut(known.token_ids(text), length, windows)
    if out is not None:
        bits = None if scheme.weights is None else float(scheme.average_bits or scheme.weights.bits)
        known.check_disk(out, dtype, bits, floats=False, codes=False)
    with ExitStack() as stack:
        draft = None if out is None else stack.enter_context(drafted(out))
        steps = stack.enter_context(screen.steps())
        loaded = load_model(
            model,
            dtype=dtype,
            cache=out is not None,
            dequantize=dequantize,
            trust_remote_code=trust_remote_code,
            progress=steps.begin,
        )
        found = tune(
            on_device(loaded.program, there), quantize, shown, decisive, configs=configs, learning=learning, steps=steps
        )
        written = None
        if onnx is not None and draft is not None:
            made = Result(on_device(found.quantized.program, HOST), found.chosen.plan, found.quantized.report)
            written = write_folder(onnx, loaded, made, draft, steps)
    show_loading(screen, loaded.report)
    if as_json:
        screen.document({"ok": True, "model": model, "scheme": quantize, "seconds": steps.seconds} | found.to_dict())
        return
    screen.show(tuning_table(found, quantize, len(decisive), length), found.verdict)
    if written is not None and out is not None:
        screen.show(files_table(out, written.files))


def _sizes(text: str) -> list[int]:
    """The numbers of a list separated by commas. Raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--block-sizes {text!r} is not a list of numbers: write them as 64,128") from error

"""``spinpass plan``: what would be rotated, what is refused, and what an export would take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.folders import ExportRequest, Forecast, Known, Rates, check_names
from spinpass.formats import save_plan
from spinpass.loading import check_program_options, load_model, locate
from spinpass.pipeline import plan
from spinpass.progress import Steps

from .options import (
    ALL,
    AsJson,
    Bits,
    CalibrationText,
    CalibrationWindows,
    Compare,
    Context,
    Dequantize,
    Dtype,
    Int4,
    Keep,
    KvCache,
    LayerScheme,
    LearningSeed,
    LearnOption,
    Memory,
    Minutes,
    Model,
    NoCache,
    NoVerify,
    PlanFile,
    RecipeOption,
    To,
    TrustRemoteCode,
    Verbose,
    layer_schemes,
    plan_of,
    rotation_options,
)
from .screen import screen_of
from .tables import forecast_table, show_loading, show_plan


@rotation_options
def plan_command(
    ctx: typer.Context,
    model: Model,
    config: RotationConfig | None = None,
    plan_file: PlanFile = None,
    save: Annotated[
        Path | None,
        typer.Option(help="File to write the plan to, matrices included, for --plan.", metavar="FILE"),
    ] = None,
    dtype: Dtype = "float32",
    no_cache: NoCache = False,
    bits: Bits = None,
    recipe: RecipeOption = "auto",
    keep: Keep = None,
    layer: LayerScheme = None,
    quantize: Annotated[str, typer.Option(help="Scheme to quantize by in place of a recipe.")] = "",
    int4: Int4 = False,
    kv_cache: KvCache = None,
    to: To = "onnx",
    context: Context = None,
    calibration: CalibrationText = None,
    calibration_windows: CalibrationWindows = None,
    compare: Compare = False,
    learn: LearnOption = None,
    minutes: Minutes = None,
    learning_seed: LearningSeed = 0,
    no_verify: NoVerify = False,
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    memory: Memory = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Show what would be rotated, in which form and at what cost, what is refused and why, and what an export takes.

    Nothing is written but the plan, with --save. Rotations, memory, disk and hours are
    those of spinpass export with the same options, by the shapes of the weights and by
    how fast this machine is, which two seconds of measurements tell. The exit code is 1 if nothing can be rotated.

    Example: spinpass plan ./model --form online
    """
    screen = screen_of(ctx, as_json, verbose)
    if config is None:
        raise ConfigError("a plan needs a rotation; choose from " + ALL)
    given = {"dtype": dtype in ("float16", "bfloat16"), "no_cache": no_cache}
    check_program_options(locate(model), **given, dequantize=dequantize, trust_remote_code=trust_remote_code)
    request = ExportRequest(
        model, Path(), config, to, quantize=quantize, int4=int4, kv_cache=kv_cache, dtype=dtype, cache=not no_cache,
        dequantize=dequantize, trust_remote_code=trust_remote_code, certify=not no_verify, compare=compare,
        learn=learn, minutes=minutes, learning_seed=learning_seed,
        calibration_windows=calibration_windows, bits=bits, recipe=recipe, memory=memory, context=context,
        calibration=calibration, keep=tuple(keep or ()), layers=layer_schemes(layer),
        plan=plan_of(plan_file),
    )  # fmt: skip
    with screen.steps() as steps:
        loaded = load_model(
            model,
            dtype=dtype,
            cache=not no_cache,
            dequantize=dequantize,
            trust_remote_code=trust_remote_code,
            streamed=True,
            progress=steps.begin,
        )
        check_names(request.scheme, loaded.program)
        steps.start("plan")
        decided = plan(loaded.program, request.plan or request.config or config)
        forecast = _foreseen(request, steps)
        if save is not None and decided.spaces:
            save_plan(decided, save)
    show_loading(screen, loaded.report)
    if as_json:
        about = {
            "ok": bool(decided.spaces),
            "model": model,
            "saved": str(save) if save is not None and decided.spaces else None,
            "loading": loaded.report.to_dict(),
            "seconds": steps.seconds,
            "forecast": forecast and forecast.to_dict(),
        }
        screen.document(about | {"plan": decided.to_dict(matrices=False)})
    if request.config is None:
        screen.show(f"--recipe {recipe} rotates nothing; with the rotations of --rotations and --form:")
    show_plan(screen, decided)
    if forecast is not None:
        screen.show(forecast_table(forecast, request, every_step=screen.verbose))
    if save is not None and decided.spaces:
        screen.show(f"saved as {save}")
    if not decided.spaces:
        raise typer.Exit(1)


def _foreseen(request: ExportRequest, steps: Steps) -> Forecast | None:
    """Measure the machine, and foresee the export; None where the files do not say how large the model is."""
    known = Known.of(request.model, dequantize=request.dequantize, trust_remote_code=request.trust_remote_code)
    work = known.workload(request)
    if work is None:
        return None
    steps.begin("measure the machine")
    return Forecast.of(work, Rates.measured(max(work.files, key=lambda file: file.stat().st_size, default=None)))

"""``spinpass export``: a model, rotated and certified, as a folder that a runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.config import RotationConfig
from spinpass.folders import ExportRequest, Result, card_lines, carry_out
from spinpass.formats import GptqReport

from .options import (
    ROUNDING,
    AllowPartial,
    AsJson,
    Bits,
    CalibrationText,
    CalibrationWindows,
    Compare,
    Context,
    Dequantize,
    DeviceOption,
    Dtype,
    Force,
    Int4,
    Keep,
    KvCache,
    LastLogits,
    LayerScheme,
    LearningSeed,
    LearnOption,
    Memory,
    Minutes,
    Model,
    NoCache,
    NoFuse,
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
from .screen import screen_of, team_of
from .settings import Settings
from .tables import files_table, show_loading, show_result, trial_lines


@rotation_options
def export_command(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the model and its companions to.")],
    bits: Bits = None,
    recipe: RecipeOption = "auto",
    quantize: Annotated[
        str,
        typer.Option(
            help="Scheme to quantize by in place of a recipe, for example w4g128-gptq-a8-head8.",
            rich_help_panel=ROUNDING,
        ),
    ] = "",
    keep: Keep = None,
    layer: LayerScheme = None,
    int4: Int4 = False,
    kv_cache: KvCache = None,
    calibration: CalibrationText = None,
    calibration_windows: CalibrationWindows = None,
    compare: Compare = False,
    learn: LearnOption = None,
    minutes: Minutes = None,
    learning_seed: LearningSeed = 0,
    config: RotationConfig | None = None,
    plan_file: PlanFile = None,
    to: To = "onnx",
    context: Context = None,
    no_cache: NoCache = False,
    last_logits: LastLogits = None,
    no_fuse: NoFuse = False,
    dtype: Dtype = "float32",
    device: DeviceOption = "cpu",
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    settings: Settings = None,
    no_verify: NoVerify = False,
    allow_partial: AllowPartial = False,
    force: Force = False,
    memory: Memory = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Load MODEL, rotate it, certify it, and write a folder that ONNX Runtime, OpenVINO or ExecuTorch runs.

    The weights become 4-bit integers by the recipe that was measured to be best for
    the runtime, unless --bits or --quantize says otherwise; --bits 16 keeps them as
    they are. OUT gets the model, its tokenizer and configuration, and spinpass.json,
    which says how it was made and how the written file does on text. 8-bit
    activations are multiplied as integers; what has no kernel (4-bit activations,
    caches) is simulated. The certificate is that of the rotation.

    Example: spinpass export ./model out
    """
    screen = screen_of(ctx, as_json, verbose)
    request = ExportRequest(
        model, out, config, to, quantize=quantize, calibration=calibration, int4=int4, kv_cache=kv_cache, dtype=dtype,
        cache=not no_cache, context=context, dequantize=dequantize, trust_remote_code=trust_remote_code,
        last_logits=last_logits, fuse=not no_fuse, certify=not no_verify, calibration_windows=calibration_windows,
        force=force, allow_partial=allow_partial, bits=bits, recipe=recipe,
        keep=tuple(keep or ()), layers=layer_schemes(layer), compare=compare, memory=memory,
        learn=learn, minutes=minutes, learning_seed=learning_seed, device=device, plan=plan_of(plan_file),
    )  # fmt: skip
    with screen.steps() as steps:
        result, written = carry_out(request, steps, team_of(ctx))
    if not team_of(ctx).leads:
        return
    show_loading(screen, written.loading)
    if as_json:
        about = {"ok": True, "out": str(out), "files": written.files, "notes": request.notes, "seconds": steps.seconds}
        screen.document(dict(written.manifest) | about)
        return
    show_result(screen, result)
    tried = trial_lines(written.manifest["trials"])
    card = card_lines(written.manifest["card"], written.manifest.get("compared"))
    left = _left_lines(result)
    screen.show(*_report_lines(written.report), *tried, files_table(out, written.files), *request.notes, *left, *card)


def _left_lines(result: Result) -> list[str]:
    """Which layers a scheme was meant for and could not round, by reason; and by what those of experts were."""
    if result.quantization is None:
        return []
    counted = result.quantization.obstacles.items()
    kept = [f"{n} layer{'s' * (n != 1)} stay{'s' * (n == 1)} in floats: {why}" for why, n in counted]
    return [*kept, *filter(None, [result.quantization.experts])]


def _report_lines(report: Any) -> list[str]:
    """The exporter's report for people."""
    if isinstance(report, GptqReport):
        return [report.summary]
    proof = report.certificate.verdict if report.certificate is not None else f"not certified: {report.uncertified}"
    if report.path.suffix == ".pte":
        return [f"{report.delegates} delegates, {report.integer_layers} linear layers on integers; {proof}"]
    if report.path.suffix == ".xml":
        return [f"{report.integers} constants are integers; {proof}"]
    return [f"ONNX opset {report.opset}, {report.hadamards} online Hadamards; {proof}", *report.fused_lines()]

"""``spinpass export``: a model, rotated and certified, as a folder that a runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.folders import ExportRequest, card_lines
from spinpass.formats import GptqReport

from .options import (
    AllowPartial,
    AsJson,
    Bits,
    CalibrationWindows,
    Context,
    Dequantize,
    Dtype,
    Force,
    Int4,
    Keep,
    KvCache,
    LastLogits,
    LayerScheme,
    Model,
    NoCache,
    NoFuse,
    NoVerify,
    RecipeOption,
    To,
    TrustRemoteCode,
    Verbose,
    rotation_options,
)
from .screen import screen_of
from .tables import files_table, show_loading, show_result, trial_lines


@rotation_options
def export_command(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the model and its companions to.")],
    config: RotationConfig | None = None,
    dtype: Dtype = "float32",
    no_cache: NoCache = False,
    bits: Bits = None,
    recipe: RecipeOption = "auto",
    keep: Keep = None,
    layer: LayerScheme = None,
    int4: Int4 = False,
    to: To = "onnx",
    context: Context = None,
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    quantize: Annotated[str, typer.Option(help="Scheme to quantize by, for example w4g128-gptq-a8-head8.")] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text that GPTQ, static ranges and --kv-cache calibrate on.", show_default="text of this package"
        ),
    ] = None,
    calibration_windows: CalibrationWindows = None,
    kv_cache: KvCache = None,
    last_logits: LastLogits = False,
    no_fuse: NoFuse = False,
    no_verify: NoVerify = False,
    allow_partial: AllowPartial = False,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Load MODEL, rotate it, certify it, and write a folder that ONNX Runtime or ExecuTorch runs.

    OUT gets the model, its tokenizer and configuration, and spinpass.json, which
    says how it was made. With --quantize the weights are integers in the file, and
    8-bit activations are multiplied as integers; what has no kernel (4-bit
    activations, caches) is simulated. The certificate is that of the rotation.
    ExecuTorch takes integers alone, for example 4-bit weights in groups of 32 and
    8-bit activations (w4g32-gptq-a8).

    Example: spinpass export ./model out --bits 4
    """
    screen = screen_of(ctx, as_json, verbose)
    request = ExportRequest(
        model, out, config, to, quantize=quantize, calibration=calibration, int4=int4, kv_cache=kv_cache, dtype=dtype,
        cache=not no_cache, context=context, dequantize=dequantize, trust_remote_code=trust_remote_code,
        last_logits=last_logits, fuse=not no_fuse, certify=not no_verify, calibration_windows=calibration_windows,
        force=force, allow_partial=allow_partial, bits=bits, recipe=recipe,
        keep=tuple(keep or ()), layers=tuple(_layer(each) for each in layer or ()),
    )  # fmt: skip
    with screen.steps() as steps:
        result, written = request.run(steps)
    show_loading(screen, written.loading)
    if as_json:
        about = {"ok": True, "out": str(out), "files": written.files, "notes": request.notes, "seconds": steps.seconds}
        screen.document(dict(written.manifest) | about)
        return
    show_result(screen, result)
    tried = trial_lines(written.manifest["trials"])
    card = card_lines(written.manifest["card"])
    screen.show(*_report_lines(written.report), *tried, files_table(out, written.files), *request.notes, *card)


def _layer(given: str) -> tuple[str, str]:
    """A pattern and a scheme. Raises ConfigError for anything else."""
    pattern, equals, scheme = given.rpartition("=")
    if not (pattern and equals and scheme):
        raise ConfigError(f"--layer {given!r} is not PATTERN=SCHEME: write it as *.down_proj.*=w8")
    return pattern, scheme


def _report_lines(report: Any) -> list[str]:
    """The exporter's report for people."""
    if isinstance(report, GptqReport):
        return [report.summary]
    proof = report.certificate.verdict if report.certificate is not None else f"not certified: {report.uncertified}"
    if report.path.suffix == ".pte":
        return [f"{report.delegates} delegates, {report.integer_layers} linear layers on integers; {proof}"]
    return [f"ONNX opset {report.opset}, {report.hadamards} online Hadamards; {proof}", *report.fused_lines()]

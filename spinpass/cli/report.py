"""``spinpass report``: a page on what rotation does to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, ExportError
from spinpass.folders import check_writable, rotated
from spinpass.reporting import ReportRequest

from .options import ALL, AsJson, Dequantize, DeviceOption, Model, NoVerify, TrustRemoteCode, Verbose, rotation_options
from .screen import screen_of
from .tables import files_table


@rotation_options
def report_command(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    scheme: Annotated[
        list[str] | None, typer.Option(help="Scheme to quantize by, for example w4g128-a8; may be repeated.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to run; Python's help texts by default.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text to calibrate on; other parts of --text by default.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of windows to run.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer, where MODEL has none.")] = "",
    device: DeviceOption = "cpu",
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    config: RotationConfig | None = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Write a page on what rotation does to MODEL: its activations, its quantization errors, its perplexity.

    The page is one HTML file that fetches nothing; --json prints every number
    behind it.

    Example: spinpass report ./model --scheme w4g128-rtn-a8 -o report.html
    """
    screen = screen_of(ctx, as_json, verbose)
    if config is None:
        raise ConfigError("a report needs a rotation; choose from " + ALL)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file in it, for example {out / 'report.html'}")
    page = _reporting()
    asked = ReportRequest(
        model, text, calibration, tuple(scheme or ()), windows, length, tokenizer, dequantize, trust_remote_code, device
    )
    check_writable(out.parent)
    with screen.steps() as steps:
        cut = asked.preflight()
        program = asked.open(steps)
        result = rotated(program, config, steps, certify=not no_verify)
        assert result.plan is not None
        versions = result.to_dict()["versions"]
        found = asked.measure((program, result.program), cut, result.plan, result.certificate, steps, versions)
        page.write_page(found, out, steps.start("draw"))
    if as_json:
        screen.document({"ok": True, "out": str(out)} | found.to_dict())
    screen.show(files_table(out.parent, [out.name]))


def _reporting() -> Any:
    """The module that writes pages, imported when it is needed. Raises ExportError where matplotlib is missing."""
    try:
        from spinpass.reporting import page
    except ModuleNotFoundError as error:
        raise ExportError(f"a report needs {error.name}: pip install 'spinpass[report]'") from error
    return page

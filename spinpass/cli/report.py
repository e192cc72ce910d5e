"""``spinpass report``: a page on what rotation does to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, ExportError
from spinpass.folders import check_writable, rotated
from spinpass.reporting import ReportRequest

from .options import ALL, AsJson, Model, NoVerify, Verbose, rotation_options
from .screen import screen_of
from .tables import files_table


@rotation_options
def report_command(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    scheme: Annotated[list[str] | None, typer.Option(help="Quantize so, say w4g128-a8; may be repeated.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to run; else Python's help texts.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="To calibrate on; else other parts of the text.")] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer, where MODEL has none.")] = "",
    config: RotationConfig | None = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Write a page on what rotation does to MODEL: its activations, its quantization errors, its perplexity.

    With every number behind it in JSON mode.
    """
    screen = screen_of(ctx, as_json, verbose)
    if config is None:
        raise ConfigError("a report needs a rotation; choose from " + ALL)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file in it, {out / 'report.html'} say")
    page, asked = _reporting(), ReportRequest(model, text, calibration, tuple(scheme or ()), windows, length, tokenizer)
    check_writable(out.parent)
    with screen.steps() as steps:
        program, opened = asked.open(steps)
        texts = asked.texts(opened)
        result = rotated(program, config, steps, certify=not no_verify)
        assert result.plan is not None
        versions = result.to_dict()["versions"]
        found = asked.measure((program, result.program), texts, result.plan, result.certificate, steps, versions)
        page.write_page(found, out, steps.start("draw"))
    if as_json:
        screen.document({"ok": True, "out": str(out)} | found.to_dict())
    screen.show(files_table(out.parent, [out.name]))


def _reporting() -> Any:
    """The pages, imported when they are needed: they draw with matplotlib."""
    try:
        from spinpass.reporting import page
    except ModuleNotFoundError as error:
        raise ExportError(f"a report needs {error.name}: pip install 'spinpass[report]'") from error
    return page

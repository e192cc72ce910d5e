"""``spinpass report``: a page on what rotation does to a model, or on two reports beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.folders import check_writable, rotated
from spinpass.reporting import ReportRequest, SavedReport, compare_reports, save_report, write_comparison, write_page

from .options import ALL, AsJson, Dequantize, DeviceOption, NoVerify, TrustRemoteCode, Verbose, rotation_options
from .screen import Screen, screen_of, typed_command
from .tables import files_table

_OF_TWO = {"model", "other", "out", "as_json", "verbose"}  # what a comparison of two reports reads


@rotation_options
def report_command(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder, a hub name, a GGUF file, a .pt2 file, or the JSON of a report."
        ),
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="The JSON of another report, to compare two.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    save: Annotated[
        Path | None,
        typer.Option(help="JSON file to keep the numbers in, for a comparison with another report.", metavar="FILE"),
    ] = None,
    scheme: Annotated[
        list[str] | None, typer.Option(help="Scheme to quantize by, for example w4g128-a8; may be repeated.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="Exported folder made of MODEL, to score and time in its runtime; may be repeated."),
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
    """Write a page on what rotation does to MODEL: a verdict, size, quality and speed, loss per layer, activations.

    The page is one HTML file that fetches nothing; --json prints every number
    behind it, and --save keeps them. With two files of numbers, the page compares
    them.

    Example: spinpass report ./model --scheme w4g128-rtn-a8 -o report.html
    """
    screen = screen_of(ctx, as_json, verbose)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file in it, for example {out / 'report.html'}")
    if save is not None and save.suffix != ".json":
        raise ConfigError(
            f"--save {save} keeps the numbers, in a file whose name ends in .json; the page goes to --out FILE.html"
        )
    if model.endswith(".json") or other is not None:
        _compare(ctx, model, other, out, screen)
        return
    if config is None:
        raise ConfigError("a report needs a rotation; choose from " + ALL)
    asked = ReportRequest(
        model, text, calibration, tuple(scheme or ()), tuple(file or ()), windows=windows, length=length,
        tokenizer=tokenizer, dequantize=dequantize, trust_remote_code=trust_remote_code, device=device,
    )  # fmt: skip
    for folder in {out.parent, (save or out).parent}:
        check_writable(folder)
    with screen.steps() as steps:
        cut = asked.preflight()
        program = asked.open(steps)
        result = rotated(program, config, steps, certify=not no_verify)
        assert result.plan is not None
        versions = result.to_dict()["versions"]
        programs, command = (program, result.program), typed_command(ctx)
        found = asked.measure(programs, cut, result.plan, result.certificate, steps, versions, command)
        write_page(found, out, steps.start("draw"))
        if save is not None:
            save_report(found, save)
    if as_json:
        screen.document({"ok": True, "out": str(out)} | found.to_dict())
    screen.show(*(files_table(path.parent, [path.name]) for path in (out, save) if path is not None))


def _compare(ctx: typer.Context, model: str, other: Path | None, out: Path, screen: Screen) -> None:
    """Compare two reports. Raises ConfigError where one is none, or an option was given that only measuring reads."""
    if other is None:
        raise ConfigError(f"{model} is the JSON of a report: name a second one to compare it with")
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if source is not None and source.name == "COMMANDLINE" and param.name not in _OF_TWO:
            raise ConfigError(f"two reports are compared as they are: leave out {param.opts[0]}")
    found = compare_reports(SavedReport.read(Path(model)), SavedReport.read(other))
    write_comparison(found, out)
    if screen.as_json:
        screen.document({"ok": True, "out": str(out)} | found.to_dict())
    screen.show(files_table(out.parent, [out.name]))

"""``spinpass verify``: two programs, or a program and a file, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.certificate import Certificate, verify
from spinpass.errors import ConfigError, ExportError
from spinpass.formats import finish, load_program

from .options import AsJson, Verbose
from .screen import screen_of
from .tables import certificate_table


def verify_command(
    ctx: typer.Context,
    before: Annotated[Path, typer.Argument(metavar="A", help="Exported program, .pt2.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another .pt2 file, an .onnx file or its folder.")],
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Compare B with A on the same inputs; the exit code is 1 if they do not compute the same function.

    B may be rotated and A the original: a KV cache that one of them carries in a
    rotated basis is translated. Nothing is written.

    Example: spinpass verify model.pt2 rotated.pt2
    """
    screen = screen_of(ctx, as_json, verbose)
    finish(after)
    file = after / "model.onnx" if after.is_dir() else after
    for path in (before, file):
        if not path.is_file():
            raise ConfigError(f"there is no file {path}: name a .pt2 or .onnx file, or a folder with model.onnx")
    if before.suffix != ".pt2":
        raise ConfigError(f"{before} is no .pt2 file: name the program that B is compared with")
    if file.suffix not in (".pt2", ".onnx"):
        raise ConfigError(f"{file} is neither a .pt2 nor an .onnx file: name one")
    certificate: Any
    with screen.steps() as steps:
        steps.start("load")
        reference = load_program(before)
        if file.suffix == ".onnx":
            compare = _onnx_compare()
            steps.start("compare")
            certificate = compare(reference, file)
        else:
            other = load_program(file)
            certificate = verify(reference, other, progress=steps.start("compare"))
    if as_json:
        screen.document(certificate.to_dict())
    elif isinstance(certificate, Certificate):
        screen.show(certificate_table(certificate.to_dict(), every_output=screen.verbose))
    else:
        screen.show(certificate.verdict)
    if not certificate.ok:
        raise typer.Exit(1)


def _onnx_compare() -> Any:
    """What compares a program with an ONNX file. Raises ExportError where ONNX is missing."""
    try:
        from spinpass.exporters.onnx import compare_file
    except ModuleNotFoundError as error:
        raise ExportError(f"reading ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    return compare_file

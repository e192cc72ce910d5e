"""``spinpass verify``: two programs, a program and a file, or two models, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.certificate import Certificate, narrowest_dtype, verify
from spinpass.errors import ConfigError, ExportError
from spinpass.folders import BasisProof, check_basis
from spinpass.formats import finish, load_program, read_matrices
from spinpass.loading import LoadedModel, load_model

from .options import AsJson, Dequantize, Matrices, Verbose
from .screen import screen_of
from .tables import certificate_table, show_loading

_EXPERTS = "batched_mm"  # transformers' grouped product has no float64, which proofs compute in


def verify_command(
    ctx: typer.Context,
    before: Annotated[
        Path, typer.Argument(metavar="A", help="Exported program, .pt2, or a model folder or GGUF file.")
    ],
    after: Annotated[
        Path, typer.Argument(metavar="B", help="Another .pt2 file, an .onnx file or its folder; or another model.")
    ],
    matrices: Matrices = None,
    dequantize: Dequantize = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Compare B with A on the same inputs; the exit code is 1 if they do not compute the same function.

    B may be rotated and A the original: a KV cache that one of them carries in a
    rotated basis is translated. Of two models, such as a folder and what
    rotate-checkpoint has made of it, prompts are compared, and each weight of B with
    A's in the basis that B declares. Nothing is written.

    Example: spinpass verify model.pt2 rotated.pt2
    """
    screen = screen_of(ctx, as_json, verbose)
    finish(after)
    file = after / "model.onnx" if after.is_dir() else after
    models = before.suffix != ".pt2" and (before.is_dir() or before.suffix == ".gguf")
    if models and file.suffix == ".onnx" and file.is_file():
        raise ConfigError(f"{after} holds an ONNX file, to be compared with a program: name a .pt2 file, not {before}")
    if models:
        _verify_models(screen, before, after, matrices, dequantize=dequantize)
        return
    if matrices is not None:
        raise ConfigError("--matrices is for two models, of which one was rotated by them: leave it out")
    if dequantize:
        raise ConfigError("--dequantize is for two models, of which one is quantized: leave it out")
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
    _show(screen, certificate, None)


def _verify_models(screen: Any, before: Path, after: Path, matrices: Path | None, *, dequantize: bool) -> None:
    """Compare two models, and the weights of the second with those of the first in the basis that it declares."""
    given = None if matrices is None else read_matrices(matrices)
    with screen.steps() as steps:
        other = _loaded(after, steps, dequantize)
        dtype = str(narrowest_dtype(other.program)).removeprefix("torch.")  # of what was written, and computed in
        original = _loaded(before, steps, dequantize, dtype)
        proof = None
        rounded = dequantize and other.report.dequantized is not None
        if other.declared is not None and original.declared is None and not rounded:
            steps.start("compare the weights")
            proof = check_basis(original.program, other.program, other.declared, given)
        elif given is not None:
            raise ConfigError(f"{after} declares no rotation of {before}: leave out --matrices")
        certificate = verify(original.program, other.program, progress=steps.start("compare"))
    for loaded in (original, other):
        show_loading(screen, loaded.report)
    if rounded:
        screen.note(
            f"{after} holds integers, so that it is another function than {before}: the errors say how far rounding "
            "moves the outputs, and spinpass eval how well each predicts a text"
        )
    _show(screen, certificate, proof)


def _loaded(model: Path, steps: Any, dequantize: bool, dtype: str = "auto") -> LoadedModel:
    options: dict[str, Any] = {"dtype": dtype, "dequantize": dequantize, "progress": steps.begin}
    return load_model(model, cache=False, experts=_EXPERTS, streamed=True, **options)


def _show(screen: Any, certificate: Any, proof: BasisProof | None) -> None:
    """Show a certificate, and leave with exit code 1 where it has failed."""
    if screen.as_json:
        basis = {} if proof is None else {"basis": vars(proof)}
        screen.document(certificate.to_dict() | basis)
    elif isinstance(certificate, Certificate):
        screen.show(certificate_table(certificate.to_dict(), every_output=screen.verbose))
    else:
        screen.show(certificate.verdict)
    if proof is not None:
        screen.show(proof.summary)
    if not certificate.ok:
        raise typer.Exit(1)


def _onnx_compare() -> Any:
    """What compares a program with an ONNX file. Raises ExportError where ONNX is missing."""
    try:
        from spinpass.exporters.onnx import compare_file
    except ModuleNotFoundError as error:
        raise ExportError(f"reading ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    return compare_file

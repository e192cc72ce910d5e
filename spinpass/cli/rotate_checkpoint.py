"""``spinpass rotate-checkpoint``: a folder of transformers, rotated and written as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.config import RotationConfig
from spinpass.folders import FOLDED, rotate_checkpoint
from spinpass.formats import read_matrices

from .options import AsJson, DeviceOption, Force, Matrices, NoVerify, Verbose
from .screen import screen_of
from .tables import files_table, show_loading, show_result, trial_lines


def rotate_checkpoint_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub name or GGUF file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the checkpoint to.")],
    rotations: Annotated[str, typer.Option(help="R1, R2 or both, separated by a comma.")] = ",".join(FOLDED.rotations),
    tied: Annotated[
        str | None,
        typer.Option(help="untie, the default, gives a head that is the table its own; keep leaves out R1."),
    ] = None,
    matrices: Matrices = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto keeps that of the files.")] = "auto",
    device: DeviceOption = "cpu",
    no_verify: NoVerify = False,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Fold R1 and R2 into a checkpoint of transformers, and write it as one.

    Any tool that quantizes or runs such checkpoints takes it: nothing is computed
    online. The weights are read from their files and written one after the other, so
    a model may be larger than the memory. OUT is loaded by transformers and compared.

    Example: spinpass rotate-checkpoint ./model rotated
    """
    screen = screen_of(ctx, as_json, verbose)
    chosen = tuple(part.strip() for part in rotations.split(","))
    of_r1 = {"form": FOLDED.form, "tied": FOLDED.tied} if "R1" in chosen else {}
    given = {} if tied is None else {"tied": tied}
    options: dict[str, Any] = of_r1 | given | ({} if matrices is None else {"matrices": read_matrices(matrices)})
    config = RotationConfig(rotations=chosen, **options)  # type: ignore[arg-type]
    with screen.steps() as steps:
        result, written = rotate_checkpoint(
            model, out, config, dtype=dtype, device=device, certify=not no_verify, force=force, steps=steps
        )
    show_loading(screen, written.loading)
    if as_json:
        about = {"ok": True, "out": str(out), "files": written.files, "seconds": steps.seconds}
        screen.document(dict(written.manifest) | about)
        return
    show_result(screen, result)
    tried = trial_lines(written.manifest["trials"])
    screen.show(written.report.summary, *tried, files_table(out, written.files))

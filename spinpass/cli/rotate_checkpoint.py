"""``spinpass rotate-checkpoint``: a folder of transformers, rotated and written as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinpass.config import Override, RotationConfig
from spinpass.errors import ConfigError
from spinpass.folders import FOLDED, CheckpointLayout, rotate_checkpoint
from spinpass.formats import read_matrices

from .options import AsJson, Dequantize, DeviceOption, Force, Keep, Matrices, NoVerify, Verbose
from .screen import screen_of
from .tables import files_table, show_loading, show_result, trial_lines

_ONLINE = ("R3", "R4", "heads")


def rotate_checkpoint_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub name or GGUF file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the checkpoint to.")],
    rotations: Annotated[
        str,
        typer.Option(help="R1, R2 or both, separated by a comma; R3, R4 beside them with --layout compressed-tensors."),
    ] = ",".join(FOLDED.rotations),
    tied: Annotated[
        str | None,
        typer.Option(help="untie, the default with R1, gives a head that is the table its own; R2 alone keeps it."),
    ] = None,
    matrices: Matrices = None,
    quantize: Annotated[str, typer.Option(help="Scheme of weights, for example w4g128-gptq; empty keeps values.")] = "",
    layout: Annotated[
        CheckpointLayout | None,
        typer.Option(
            help="Of the files: transformers (floats), gptq (integers, the default with --quantize) or "
            "compressed-tensors (either; it declares R3 and R4, where --rotations has them)."
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="Of what stays online, in diagonal blocks: a power of two needs no matrix in the files."),
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text for GPTQ; a text of this package by default.")] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of the text; 16 by default.")] = None,
    keep: Keep = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto keeps that of the files.")] = "auto",
    dequantize: Dequantize = False,
    device: DeviceOption = "cpu",
    no_verify: NoVerify = False,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Fold R1 and R2 into a checkpoint of transformers, and write it as one.

    Any tool that quantizes or runs such checkpoints takes it: nothing is computed
    online, but what compressed-tensors is told of. The weights are read from their
    files and written one after the other, so a model may be larger than the memory.
    OUT is loaded again and compared, where that takes no more than 100 MB.

    Example: spinpass rotate-checkpoint ./model rotated --quantize w4g128-gptq
    """
    screen = screen_of(ctx, as_json, verbose)
    chosen = tuple(part.strip() for part in rotations.split(","))
    of_r1 = {"form": FOLDED.form, "tied": FOLDED.tied} if "R1" in chosen else {}
    given = {} if tied is None else {"tied": tied}
    online = [role for role in chosen if role in _ONLINE]
    if block_size is not None and not online:
        raise ConfigError(f"--block-size {block_size} is of rotations that stay online: add R3 or R4 to --rotations")
    blocks = {} if block_size is None else {role: Override(block_size=block_size) for role in online}
    options: dict[str, Any] = of_r1 | given | ({} if matrices is None else {"matrices": read_matrices(matrices)})
    config = RotationConfig(rotations=chosen, overrides=blocks, **options)  # type: ignore[arg-type]
    with screen.steps() as steps:
        result, written = rotate_checkpoint(
            model,
            out,
            config,
            quantize=quantize,
            layout=layout,
            calibration=calibration,
            calibration_windows=samples,
            keep=tuple(keep or ()),
            dtype=dtype,
            dequantize=dequantize,
            device=device,
            certify=not no_verify,
            force=force,
            steps=steps,
        )
    show_loading(screen, written.loading)
    if as_json:
        about = {"ok": True, "out": str(out), "files": written.files, "seconds": steps.seconds}
        screen.document(dict(written.manifest) | about)
        return
    show_result(screen, result)
    tried = trial_lines(written.manifest["trials"])
    left = filter(None, [written.report.left])
    screen.show(written.report.summary, *left, *tried, files_table(out, written.files))

"""``spinpass rotate``: an exported program, rotated and certified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.folders import check_space, check_writable, rotated
from spinpass.formats import load_program, save_program
from spinpass.graph import device_of, named_device, on_device

from .options import (
    ALL,
    AllowPartial,
    AsJson,
    DeviceOption,
    NoVerify,
    PlanFile,
    Verbose,
    plan_of,
    rotation_options,
)
from .screen import screen_of
from .tables import files_table, show_result


@rotation_options
def rotate_command(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN.pt2", help="Exported program to rotate.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.pt2", help="File to write the rotated program to.")],
    config: RotationConfig | None = None,
    plan_file: PlanFile = None,
    device: DeviceOption = "cpu",
    no_verify: NoVerify = False,
    allow_partial: AllowPartial = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Rotate an exported program, certify it, and save it as OUT.pt2.

    Example: spinpass rotate model.pt2 rotated.pt2 --rotations R1,R2,R4
    """
    screen = screen_of(ctx, as_json, verbose)
    there = named_device(device)
    if config is None:
        raise ConfigError("rotate needs a rotation; choose from " + ALL)
    plan = plan_of(plan_file)
    if plan is not None and config != RotationConfig():
        raise ConfigError("--plan has rotations of its own: leave out the other options of rotations, or --plan")
    if target.suffix != ".pt2":
        raise ConfigError(f"{target} does not end in .pt2, the name of an exported program")
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} is the program that is rotated: name another file")
    if not source.is_file():
        raise ConfigError(f"there is no file {source}: name a program that torch.export.save has written")
    check_writable(target.parent)
    check_space(target.parent, source.stat().st_size)
    with screen.steps() as steps:
        steps.start("load")
        given = load_program(source)
        program, decided = on_device(given, there), config if plan is None else plan.config
        result = rotated(program, decided, steps, certify=not no_verify, allow_partial=allow_partial, plan=plan)
        steps.start("save")
        save_program(on_device(result.program, device_of(given)), target)
    if as_json:
        about = {"ok": True, "source": str(source), "target": str(target), "seconds": steps.seconds}
        screen.document(about | result.to_dict())
        return
    show_result(screen, result)
    screen.show(files_table(target.parent, [target.name]))

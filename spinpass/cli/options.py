"""The options that several commands share, and the configuration they amount to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from spinpass.config import DEFAULT_ROLES, ROLES, Cache, Form, Kind, RotationConfig, Tied
from spinpass.folders import IntegerCache, Target

ALL = ",".join(ROLES)
DEFAULT = ",".join(DEFAULT_ROLES)

Rotations = Annotated[
    str, typer.Option(help="Comma-separated; in export, none writes the model as it is, to compare with.", metavar=ALL)
]
KindOption = Annotated[Kind, typer.Option(help="Of the rotation matrices.")]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Rotate in diagonal blocks of this size; it must divide every space.", show_default="whole spaces"
    ),
]
Seed = Annotated[int, typer.Option(help="Of the random kinds.")]
TiedOption = Annotated[
    Tied, typer.Option(help="A table shared by embedding and head: keep it, or give the head one of its own.")
]
FormOption = Annotated[Form, typer.Option(help="Of R1: in the residual stream, or at the linears' inputs.")]
CacheOption = Annotated[Cache, typer.Option(help="Let the KV cache travel rotated, or leave out what would rotate it.")]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Pattern of spaces or parameters to leave alone; may be repeated.", metavar="PATTERN"),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "auto"], typer.Option(help="Of the weights; auto: as stored.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Export the prompt's pass alone, without a KV cache.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not certify the result.")]
To = Annotated[Target, typer.Option(help="For this runtime, or as a checkpoint.")]
Context = Annotated[
    int, typer.Option(help="With --to executorch: tokens that the KV cache inside holds, prompt and answer.")
]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Where MODEL is a GPTQ checkpoint, take the values of its integers.")
]
Int4 = Annotated[bool, typer.Option("--int4", help="Pack the weights to 4 bits (MatMulNBits).")]
KvCache = Annotated[
    IntegerCache | None,
    typer.Option(help="Keep keys and values as integers, with scales from the calibration text."),
]
NoFuse = Annotated[
    bool, typer.Option("--no-fuse", help="Standard ONNX operators only, instead of ONNX Runtime's for attention.")
]
LastLogits = Annotated[
    bool, typer.Option("--last-logits", help="Compute the logits of the last token alone: prompts are read faster.")
]
CalibrationWindows = Annotated[int, typer.Option("--samples", help="Windows of 512 tokens to calibrate on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="Log every pass, show every line; -vv: tracebacks.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a name on the hub, a GGUF file or a .pt2 file.")
]


def rotation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a rotation in place of its parameter ``config``, which gets what they amount to."""
    own = inspect.signature(command, eval_str=True)
    options = inspect.signature(configuration, eval_str=True).parameters
    listed: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        listed += options.values() if parameter.name == "config" else [parameter]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        config = configuration(**{name: given.pop(name) for name in options})
        command(**given, config=config)

    run.__signature__ = own.replace(parameters=listed)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    return run


def configuration(
    rotations: Rotations = DEFAULT,
    kind: KindOption = "hadamard",
    block_size: BlockSize = None,
    seed: Seed = 0,
    tied: TiedOption = "auto",
    form: FormOption = "auto",
    cache: CacheOption = "rotated",
    exclude: Exclude = None,
) -> RotationConfig | None:
    """What the options ask for; None for ``--rotations none``."""
    if rotations.strip().lower() == "none":
        return None
    chosen: Any = tuple(name.strip() for name in rotations.split(","))
    return RotationConfig(
        rotations=chosen,
        kind=kind,
        block_size=block_size,
        seed=seed,
        tied=tied,
        form=form,
        cache=cache,
        exclude=tuple(exclude or ()),
    )

"""The options that several commands share, and the configuration that they amount to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from spinpass.config import DEFAULT_ROLES, ROLES, CacheBasis, Form, Kind, RotationConfig, Tied
from spinpass.errors import ConfigError
from spinpass.folders import IntegerCache, LearnName, RecipeName, Target
from spinpass.formats import load_plan, read_matrices
from spinpass.planning import RotationPlan

ALL = ",".join(ROLES)
DEFAULT = ",".join(DEFAULT_ROLES)

# the boxes that --help shows
ROTATING, READING, ROUNDING = "Rotations", "Reading the model", "Quantization"
LEARNING, WRITING = "Learning", "What is written"

Rotations = Annotated[
    str,
    typer.Option(
        help="Rotations to make, separated by commas; in export, none writes the original, to compare with.",
        metavar=ALL,
        rich_help_panel=ROTATING,
    ),
]
KindOption = Annotated[Kind, typer.Option(help="Kind of the rotation matrices.", rich_help_panel=ROTATING)]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Rotate in diagonal blocks of this size, which must divide that of every space.",
        show_default="whole spaces",
        rich_help_panel=ROTATING,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed for the random kinds.", rich_help_panel=ROTATING)]
TiedOption = Annotated[
    Tied,
    typer.Option(
        help="Keep a table that embedding and head share, or give the head one of its own (untie); auto unties where "
        "that is cheap.",
        rich_help_panel=ROTATING,
    ),
]
FormOption = Annotated[
    Form,
    typer.Option(
        help="Place of R1: in the residual stream and folded into the weights (offline), or at the inputs of the "
        "linear layers (online).",
        rich_help_panel=ROTATING,
    ),
]
CacheOption = Annotated[
    CacheBasis,
    typer.Option(
        help="Let the KV cache be stored rotated, or leave out the rotations that need it (plain).",
        rich_help_panel=ROTATING,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Pattern of spaces or parameters to leave alone, for example R4:*; may be repeated.",
        metavar="PATTERN",
        rich_help_panel=ROTATING,
    ),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16", "auto"],
    typer.Option(help="Dtype of the weights; auto takes the one they are stored in.", rich_help_panel=READING),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where weights are folded, rounded and run: cpu, cuda, or one of several, cuda:1.",
        metavar="cpu|cuda|cuda:N",
        rich_help_panel=READING,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Export without a KV cache, for whole prompts alone.", rich_help_panel=WRITING),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not certify the result.")]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial", help="Where the certificate fails, leave out the spaces to blame instead of stopping."
    ),
]
Matrices = Annotated[
    Path | None,
    typer.Option(
        help="Learned matrices: a file of spinpass learn, or SpinQuant's R.bin; other rotations are as --kind says.",
        metavar="FILE",
        rich_help_panel=ROTATING,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="Plan to carry out, written by spinpass plan MODEL --save FILE; it stands in place of all options of "
        "rotations.",
        metavar="FILE",
        rich_help_panel=ROTATING,
    ),
]
To = Annotated[
    Target, typer.Option(help="Runtime that the folder is for, or gptq for a GPTQ checkpoint.", rich_help_panel=WRITING)
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens, prompt and answer, that the KV cache inside an ExecuTorch program holds.",
        show_default="1024",
        rich_help_panel=WRITING,
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Where MODEL is quantized (GPTQ, compressed-tensors, FP8, MXFP4), take the values of its codes; it is "
        "refused otherwise.",
        rich_help_panel=READING,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the modelling code that comes with MODEL; none is run otherwise.",
        rich_help_panel=READING,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="Bits of the weights, by a recipe: 16 keeps the values; 8, 4, 3, 2.",
        metavar="16|8|4|3|2",
        show_default="4, without --quantize or --int4",
        rich_help_panel=ROUNDING,
    ),
]
RecipeOption = Annotated[
    RecipeName,
    typer.Option(
        help="The best measured for these bits, the same on less text, or rounding to nearest unrotated.",
        rich_help_panel=ROUNDING,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Pattern of parameters whose layers stay in floats; may be repeated.",
        metavar="PATTERN",
        rich_help_panel=ROUNDING,
    ),
]
LayerScheme = Annotated[
    list[str] | None,
    typer.Option(
        help="Scheme of the weights of some layers, for example *.down_proj.*=w8; may be repeated.",
        metavar="PATTERN=SCHEME",
        rich_help_panel=ROUNDING,
    ),
]
LearnOption = Annotated[
    LearnName | None,
    typer.Option(
        "--learn",
        help="What is learned from the unrounded model once all is rounded: none; local, scales of weights and norms "
        "block by block, in little memory; or full, all together by what it predicts.",
        show_default="scales, by --bits 4, 3 or 2; full, with --minutes",
        rich_help_panel=LEARNING,
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        help="Minutes that learning may take.", show_default="three rounds through the text", rich_help_panel=LEARNING
    ),
]
LearningSeed = Annotated[
    int,
    typer.Option(help="Seed of the order in which learning goes through the text.", min=0, rich_help_panel=LEARNING),
]
Int4 = Annotated[
    bool,
    typer.Option(
        "--int4", help="Pack the weights to 4 bits (MatMulNBits), without a scheme.", rich_help_panel=ROUNDING
    ),
]
KvCache = Annotated[
    IntegerCache | None,
    typer.Option(
        help="Keep keys and values as integers in ONNX Runtime, with scales from the calibration text.",
        rich_help_panel=ROUNDING,
    ),
]
NoFuse = Annotated[
    bool,
    typer.Option(
        "--no-fuse",
        help="Write standard ONNX operators only, instead of ONNX Runtime's own for attention.",
        rich_help_panel=WRITING,
    ),
]
LastLogits = Annotated[
    bool | None,
    typer.Option(
        "--last-logits/--all-logits",
        help="Compute the logits of a prompt's last token alone, so that it is read faster, or those of every token.",
        show_default="the last in ONNX, by a recipe of less than 16 bits",
        rich_help_panel=WRITING,
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Make the original by the same scheme as well, and keep which does better on text.",
        rich_help_panel=ROUNDING,
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="What GPTQ, static ranges and --kv-cache calibrate on: the file of a UTF-8 text; a dataset, as in "
        "eval --dataset; or self, text that MODEL writes.",
        metavar="FILE|DATASET|self",
        show_default="text of this package",
        rich_help_panel=ROUNDING,
    ),
]
DecidingText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="UTF-8 text that decides, of another source than the other.",
        show_default="Python's documentation",
    ),
]
CalibrationWindows = Annotated[
    int | None,
    typer.Option(
        "--samples",
        help="Number of calibration windows, of 512 tokens each, or of --length where that is an option.",
        show_default="what the text holds, at most 16",
        rich_help_panel=ROUNDING,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Write into OUT though it holds files that no export has put there.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory that the run may take; what cannot fit is refused before anything is read.",
        metavar="SIZE",
        show_default="what is free",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document instead of tables, and progress as events, a line each, on stderr."
    ),
]
Verbose = Annotated[
    int,
    typer.Option("-v", "--verbose", count=True, help="Log every pass and show every line; -vv shows tracebacks too."),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a name on the hub, a GGUF file or a .pt2 file.")
]


def spelled_out(name: str, made: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that ``made`` takes in place of its parameter ``name``, which gets what it returns."""

    def spell_out(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        options = inspect.signature(made, eval_str=True).parameters
        listed: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            listed += options.values() if parameter.name == name else [parameter]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            given[name] = made(**{option: given.pop(option) for option in options})
            command(**given)

        run.__signature__ = own.replace(parameters=listed)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
        return run

    return spell_out


def configuration(
    rotations: Rotations = DEFAULT,
    kind: KindOption = "hadamard",
    block_size: BlockSize = None,
    seed: Seed = 0,
    tied: TiedOption = "auto",
    form: FormOption = "auto",
    cache: CacheOption = "rotated",
    exclude: Exclude = None,
    matrices: Matrices = None,
) -> RotationConfig | None:
    """What the options ask for; None for ``--rotations none``. Raises ConfigError where that means nothing."""
    if rotations.strip().lower() == "none":
        given = {
            "kind": kind != "hadamard", "block-size": block_size is not None, "seed": seed != 0, "tied": tied != "auto",
            "form": form != "auto", "cache": cache != "rotated", "exclude": bool(exclude),
            "matrices": matrices is not None,
        }  # fmt: skip
        unused = [f"--{name}" for name, was in given.items() if was]
        if unused:
            raise ConfigError(f"--rotations none rotates nothing: leave out {', '.join(unused)}")
        return None
    chosen: Any = tuple(name.strip() for name in rotations.split(","))
    given_matrices = {} if matrices is None else read_matrices(matrices)
    if chosen == DEFAULT_ROLES:  # a rotation that takes matrices alone is asked for by giving them
        named = dict.fromkeys(name.partition(":")[0] for name in given_matrices)
        chosen += tuple(role for role in named if role in ROLES and role not in chosen)
    return RotationConfig(
        rotations=chosen,
        kind=kind,
        block_size=block_size,
        seed=seed,
        tied=tied,
        form=form,
        cache=cache,
        exclude=tuple(exclude or ()),
        matrices=given_matrices,
    )


rotation_options = spelled_out("config", configuration)
"""Gives a command the options of a rotation in place of its parameter ``config``."""


def plan_of(file: Path | None) -> RotationPlan | None:
    """What --plan names; None where it was not given. Raises ConfigError and DamageError where that is no plan."""
    return None if file is None else load_plan(file)


def layer_schemes(given: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """What --layer was given, as patterns and schemes. Raises ConfigError for anything else."""
    return tuple(_layer_scheme(each) for each in given or ())


def _layer_scheme(given: str) -> tuple[str, str]:
    pattern, equals, scheme = given.rpartition("=")
    if not (pattern and equals and scheme):
        raise ConfigError(f"--layer {given!r} is not PATTERN=SCHEME: write it as *.down_proj.*=w8")
    return pattern, scheme

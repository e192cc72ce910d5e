"""``spinpass learn``: the changes of basis that a model is rounded best in, as a file of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.config import DEFAULT_ROLES, RotationConfig
from spinpass.errors import ConfigError
from spinpass.evaluation import SHIPPED_TEXT, learning_text, token_ids
from spinpass.folders import Known, check_space, check_writable, window_length
from spinpass.formats import write_matrices
from spinpass.graph import named_device, on_device
from spinpass.learned import BALANCE, balance, balances, check_balancing, with_learned_bases
from spinpass.learning import Learning, Phase, forget
from spinpass.loading import load_model
from spinpass.quantization import LEARNABLE, QuantizationConfig, check_kinds, kinds_of_bases
from spinpass.rotations import Rotation

from .options import (
    ALL,
    AsJson,
    DecidingText,
    Dequantize,
    DeviceOption,
    Dtype,
    LearningSeed,
    Minutes,
    Model,
    TrustRemoteCode,
    Verbose,
    rotation_options,
)
from .screen import screen_of
from .tables import files_table, show_loading

_BYTES = 1 << 24  # of a file of matrices, about


@rotation_options
def learn_command(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT.json", help="File to write the matrices to.")],
    quantize: Annotated[str, typer.Option(help="Scheme to learn them for, for example w4-asym-gptq-a4-kv4.")],
    config: RotationConfig | None = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            help=f"Kinds of matrices, by commas: {BALANCE}, a closed form for keys and for channels in front of linear "
            f"layers, which comes first; and {', '.join(kinds_of_bases(LEARNABLE))}, which learn by steps.",
            metavar="KINDS",
            show_default=f"{BALANCE}; transforms where neither activations nor a cache are rounded",
        ),
    ] = None,
    phase: Annotated[
        Phase, typer.Option(help="Learn block by block, in little memory, or by what the whole model predicts.")
    ] = "local",
    rounds: Annotated[int, typer.Option(help="Rounds through the text.")] = 1,
    minutes: Minutes = None,
    learning_seed: LearningSeed = 0,
    calibration: Annotated[
        Path, typer.Option(help="UTF-8 text to learn from.", show_default="text of this package")
    ] = SHIPPED_TEXT,
    text: DecidingText = None,
    dtype: Dtype = "float32",
    device: DeviceOption = "cpu",
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Learn, for a scheme, the matrices of the rotations that MODEL admits, and write them for --matrices.

    Balanced, keys have the basis in which a cache of them rounds best, and channels in front of
    online Hadamards the scales in which activations do. With transforms, online rotations become
    any invertible matrix in the factors of the Hadamard that they begin at, at its cost; those that
    are folded through norms stay orthogonal. With stacks each value head has a matrix of its own,
    with gates each channel of the gated product a scale; both are folded.

    A kind is kept where it helps on the text that decides. A run of steps that was stopped goes on.

    Example: spinpass learn ./model bases.json --quantize w4-asym-gptq-a4-kv4 --form online
    """
    screen = screen_of(ctx, as_json, verbose)
    there = named_device(device)
    if config is None:
        raise ConfigError("nothing is learned without a rotation; choose from " + ALL)
    scheme = QuantizationConfig.parse(quantize)
    kinds = kinds or (BALANCE if balances(scheme) else "transforms")
    named = tuple(kind.strip() for kind in kinds.split(","))
    chosen = tuple(kind for kind in named if kind != BALANCE)
    check_kinds(chosen)
    other = [kind for kind in chosen if kind not in kinds_of_bases(chosen)]
    if other:
        raise ConfigError(
            f"{' and '.join(other)} are learned of what is rounded: spinpass learn finds matrices "
            f"({', '.join(kinds_of_bases(LEARNABLE))}); take spinpass tune --learn {','.join(other)}"
        )
    if BALANCE in named:
        check_balancing(scheme, quantize)
    settings = Learning(chosen or ("transforms",), (phase,), rounds=rounds, minutes=minutes, seed=learning_seed)
    if out.suffix != ".json":
        raise ConfigError(f"{out} does not end in .json, as a file of matrices does")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder, and a file of matrices is written: choose another name")
    saved = out.with_suffix(".learning.pt")
    check_writable(out.parent)
    check_space(out.parent, _BYTES)
    known = Known.of(model, dequantize=dequantize, trust_remote_code=trust_remote_code)
    known.token_ids(calibration)
    if text is not None and text.resolve() == calibration.resolve():
        raise ConfigError(f"{text} is learned from and decides, which finds what fits that text: name two of them")
    with screen.steps() as steps:
        loaded = load_model(
            model,
            dtype=dtype,
            cache=False,
            dequantize=dequantize,
            trust_remote_code=trust_remote_code,
            progress=steps.begin,
        )
        if loaded.companions is None or loaded.companions.tokenizer is None:
            raise ConfigError(f"{loaded.source.location} has no tokenizer to read a text with")
        tokenize, program = token_ids(loaded.companions.tokenizer), on_device(loaded.program, there)
        longest = window_length(loaded.companions)
        read = learning_text(program, tokenize, calibration, settings, 1, longest, judge=text)
        found, records = config, []
        if BALANCE in named:
            found, record = balance(program, found, scheme, read.shown, read.held_out, steps)
            records.append(record)
        if chosen:
            found, record = with_learned_bases(
                program, found, scheme, read.shown, settings, held_out=read.held_out, checkpoint=saved, steps=steps
            )
            records.append(record)
    matrices = {name: each for name, each in found.matrices.items() if isinstance(each, Rotation)}
    show_loading(screen, loaded.report)
    courses = [each.to_dict() for each in records]
    about = {"model": model, "scheme": quantize, "config": config.to_dict(), "learning": courses}
    kept = any(record.kept for record in records)
    if kept:
        write_matrices(out, matrices, about)
    forget(saved)
    if as_json:
        told = {"ok": kept, "out": str(out), "spaces": sorted(matrices), "seconds": steps.seconds}
        screen.document(told | about)
    screen.show(*(record.summary for record in records))
    if not kept:
        screen.show(f"{out} was not written: Hadamards round this model as well, for {quantize}")
        raise typer.Exit(1)
    roles = "" if config.rotations == DEFAULT_ROLES else f" --rotations {','.join(found.rotations)}"
    after = f"next: spinpass export {model} OUT{roles} --form {config.form} --quantize {quantize} --matrices {out}"
    screen.show(files_table(out.parent, [out.name]), after)

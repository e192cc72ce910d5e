"""The commands of the command line. Exit codes: 0 done, 1 refused or not equivalent, 2 bad usage.

A command prints a table, or with ``--json`` one JSON document, on stdout; progress and messages go to stderr.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from typer.core import TyperGroup

from spinpass.certificate import Certificate
from spinpass.certificate import verify as make_certificate
from spinpass.config import RotationConfig
from spinpass.errors import ConfigError, ExportError, SpinpassError
from spinpass.evaluation import LENGTH, SAMPLES, EvalRequest, Rotated, read_text, token_ids
from spinpass.evaluation import windows as cut
from spinpass.folders import ExportRequest, Result, check_writable, onnx_tools, rotated, version_of, write_folder
from spinpass.formats import GptqReport, load_program, read_artefact, save_program
from spinpass.loading import load_model
from spinpass.pipeline import plan as make_plan
from spinpass.planning import RotationPlan
from spinpass.quantization import QuantizationConfig
from spinpass.reporting import ReportRequest
from spinpass.runtime import Sampling
from spinpass.tuning import candidates
from spinpass.tuning import tune as run_tuning

from .generate import GenerateRequest
from .inspect import artefact_tables
from .options import (
    ALL,
    AsJson,
    Context,
    Dequantize,
    Dtype,
    Int4,
    KvCache,
    LastLogits,
    Model,
    NoCache,
    NoFuse,
    NoVerify,
    Samples,
    To,
    Verbose,
    rotation_options,
)
from .screen import Screen, certificate_table, comparison_table, plan_table, refusal_table, tuning_table

_USAGE_ERRORS = (ConfigError, ExportError)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spinpass {version_of('spinpass')}, torch {torch.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
]


@dataclass
class _State:
    """What the error handling needs to know about the command under way."""

    screen: Screen = field(default_factory=Screen)
    tracebacks: bool = False


class _Commands(TyperGroup):
    """Turns errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = state = _State()
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # whoever read the output has left; nothing more can be said
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except Exception as error:  # the last place that can say it in one line
            if state.tracebacks or hasattr(error, "exit_code"):  # typer's own way out
                raise
            if not isinstance(error, SpinpassError):
                unexpected = f"unexpected {type(error).__name__}: {_one_line(error)}; -vv shows where"
                state.screen.error(unexpected, type(error).__name__)
                raise typer.Exit(1) from error
            state.screen.error(_one_line(error), type(error).__name__)
            raise typer.Exit(2 if isinstance(error, _USAGE_ERRORS) else 1) from error
        finally:
            state.screen.close()


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rotate exported language models for low-bit quantization, and prove that they compute what they did.",
)


@app.callback()
def _root(version: Version = False) -> None:
    """Options before the command."""


@app.command()
@rotation_options
def export(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the model and what belongs to it.")],
    config: RotationConfig | None = None,
    dtype: Dtype = "float32",
    no_cache: NoCache = False,
    int4: Int4 = False,
    to: To = "onnx",
    context: Context = 1024,
    dequantize: Dequantize = False,
    quantize: Annotated[str, typer.Option(help="Quantize, say w4g128-gptq-a8-head8-embed8.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Text for GPTQ, static ranges and --kv-cache.")] = None,
    samples: Samples = SAMPLES,
    kv_cache: KvCache = None,
    last_logits: LastLogits = False,
    no_fuse: NoFuse = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Load MODEL, rotate it, certify it, and write a folder that ONNX Runtime or ExecuTorch runs.

    With --quantize the weights are integers in the file, and 8-bit activations are multiplied as integers; what has no
    kernel (4-bit activations, caches) is simulated. The certificate is that of the rotation. ExecuTorch takes integers
    alone: 4-bit weights in groups of 32, say, and 8-bit activations (w4g32-gptq-a8).
    """
    screen = _screen(ctx, as_json, verbose)
    request = ExportRequest(
        model, out, config, to, quantize=quantize, calibration=calibration, int4=int4, kv_cache=kv_cache, dtype=dtype,
        cache=not no_cache, context=context, dequantize=dequantize, last_logits=last_logits, fuse=not no_fuse,
        certify=not no_verify, samples=samples,
    )  # fmt: skip
    with screen.steps() as steps:
        result, written = request.run(steps)
    if as_json:
        about = {"ok": True, "out": str(out), "files": written.files, "notes": request.notes, "seconds": steps.seconds}
        screen.document(dict(written.manifest) | about)
        return
    _show(screen, result)
    screen.show(*_report_lines(written.report), _files_table(out, written.files), *request.notes)


@app.command()
@rotation_options
def rotate(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN.pt2", help="An exported program.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.pt2", help="Where the rotated program goes.")],
    config: RotationConfig | None = None,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Rotate an exported program, certify it, and save it."""
    screen = _screen(ctx, as_json, verbose)
    if config is None:
        raise ConfigError("rotate needs a rotation; choose from " + ALL)
    if target.suffix != ".pt2":
        raise ConfigError(f"{target} does not end in .pt2, the name of an exported program")
    check_writable(target.parent)
    with screen.steps() as steps:
        steps.start("load")
        program = load_program(source)
        result = rotated(program, config, steps, certify=not no_verify)
        steps.start("save")
        save_program(result.program, target)
    if as_json:
        about = {"ok": True, "source": str(source), "target": str(target), "seconds": steps.seconds}
        screen.document(about | result.to_dict())
        return
    _show(screen, result)
    screen.show(_files_table(target.parent, [target.name]))


@app.command()
@rotation_options
def plan(
    ctx: typer.Context,
    model: Model,
    config: RotationConfig | None = None,
    dtype: Dtype = "float32",
    no_cache: NoCache = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Show what would be rotated, in which form and at what cost, and what is refused and why. Nothing is written.

    Exits with 1 if nothing can be rotated.
    """
    screen = _screen(ctx, as_json, verbose)
    if config is None:
        raise ConfigError("a plan needs a rotation; choose from " + ALL)
    with screen.steps() as steps:
        loaded = load_model(model, dtype=dtype, cache=not no_cache, progress=steps.begin)
        steps.start("plan")
        decided = make_plan(loaded.program, config)
    if as_json:
        about = {"ok": bool(decided.spaces), "model": model, "seconds": steps.seconds}
        screen.document(about | {"plan": decided.to_dict()})
    _show_plan(screen, decided)
    if not decided.spaces:
        raise typer.Exit(1)


@app.command()
def verify(
    ctx: typer.Context,
    before: Annotated[Path, typer.Argument(metavar="A", help="An exported program, .pt2.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another .pt2, or an .onnx file or its folder.")],
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Compare B with A on the same inputs. Exits with 1 if they do not compute the same function.

    A KV cache that one of them carries in a rotated basis is translated: B may be rotated and A the original.
    """
    screen = _screen(ctx, as_json, verbose)
    file = after / "model.onnx" if after.is_dir() else after
    for path in (before, file):
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
    if file.suffix not in (".pt2", ".onnx"):
        raise ConfigError(f"{file} is neither a .pt2 nor an .onnx file")
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
            certificate = make_certificate(reference, other, progress=steps.start("compare"))
    if as_json:
        screen.document(certificate.to_dict())
    elif isinstance(certificate, Certificate):
        screen.show(certificate_table(certificate.to_dict(), every_output=screen.verbose))
    else:
        screen.show(certificate.verdict)
    if not certificate.ok:
        raise typer.Exit(1)


@app.command()
def tune(
    ctx: typer.Context,
    model: Model,
    quantize: Annotated[str, typer.Option(help="The scheme to tune for, say w4g128-gptq-a8.")],
    calibration: Annotated[Path, typer.Option(help="UTF-8 text: its first half calibrates, its second half decides.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write the best model to, for ONNX Runtime.")] = None,
    samples: Samples = SAMPLES,
    windows: Annotated[int, typer.Option(help="Windows to decide on.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = LENGTH,
    block_sizes: Annotated[str, typer.Option(help="Also try diagonal blocks of these sizes, say 64,128.")] = "",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Measure what each way to rotate MODEL is worth under a scheme, and keep what helps; nothing, perhaps."""
    screen = _screen(ctx, as_json, verbose)
    sizes = _sizes(block_sizes)
    QuantizationConfig.parse(quantize)
    onnx = None if out is None else onnx_tools()
    if out is not None:
        check_writable(out)
    with screen.steps() as steps:
        loaded = load_model(model, dtype=dtype, cache=out is not None, progress=steps.begin)
        if loaded.companions is None or loaded.companions.tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer to read {calibration} with")
        ids = token_ids(loaded.companions.tokenizer)(read_text(calibration))
        half = len(ids) // 2
        shown, decisive = (cut(part, length, n) for part, n in ((ids[:half], samples), (ids[half:], windows)))
        found = run_tuning(loaded.program, quantize, shown, decisive, configs=candidates(sizes), steps=steps)
        written = None
        if onnx is not None and out is not None:
            made = Result(found.quantized.program, found.chosen.plan, found.quantized.report)
            written = write_folder(onnx, loaded, made, out, steps)
    if as_json:
        screen.document({"ok": True, "model": model, "scheme": quantize, "seconds": steps.seconds} | found.to_dict())
        return
    screen.show(tuning_table(found, quantize, len(decisive), length), found.verdict)
    if written is not None and out is not None:
        screen.show(_files_table(out, written.files))


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: Model,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score on; else Python's help texts.")] = None,
    dataset: Annotated[str, typer.Option(help="Or a dataset, NAME:CONFIG:SPLIT, say wikitext:wikitext-2-raw-v1.")] = "",
    against: Annotated[str, typer.Option(help="Another model, the one to compare with.")] = "",
    quantize: Annotated[str, typer.Option(help="Quantize MODEL first, say w4g128-a8-kv4; compared with itself.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Text for GPTQ and static ranges.")] = None,
    samples: Samples = SAMPLES,
    rotate_form: Annotated[Rotated, typer.Option("--rotate", help="Rotate MODEL before, with R1 in this form.")] = "no",
    file: Annotated[list[str] | None, typer.Option(help="An ONNX folder made of MODEL, beside it; repeatable.")] = None,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer, where MODEL has none.")] = "",
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Perplexity of MODEL: a model folder, a hub name, GGUF, .pt2, or a folder that ONNX Runtime runs.

    With --against, --quantize, --rotate or --file also how it differs from the other or from what it was: the paired
    ratio of perplexities, how often both would say the same token, and the divergence of their predictions.
    """
    screen = _screen(ctx, as_json, verbose)
    named = (dataset, tuple(file or ()), samples)
    request = EvalRequest(model, against, quantize, calibration, rotate_form, text, windows, length, tokenizer, *named)
    with screen.steps() as steps:
        found = request.run(steps)
    if as_json:
        screen.document({"model": model, "windows": windows, "length": length} | found.to_dict())
    else:
        screen.show(comparison_table(found.main, found.files, windows, length))


@app.command()
def generate(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that spinpass export wrote.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's turn in the tokenizer's template.")] = False,
    temperature: Annotated[float, typer.Option(help="Draw at this temperature; 0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Of ONNX Runtime; its own choice by default.")] = None,
    provider: Annotated[str, typer.Option(help="ONNX Runtime's execution provider.")] = "CPUExecutionProvider",
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Continue PROMPT with a model in ONNX Runtime, and say how fast that was."""
    screen = _screen(ctx, as_json, verbose)
    sampling = Sampling(temperature, top_k, top_p, seed)
    request = GenerateRequest(folder, prompt, max_new_tokens, chat, sampling, threads, provider)
    found = request.run(lambda piece: None if as_json else typer.echo(piece, nl=False))
    if as_json:
        screen.document({"ok": True, "folder": str(folder)} | found)
        return
    typer.echo()
    rates = f"prefill {found['prefill_tokens_per_second']:.1f}, decode {found['decode_tokens_per_second']:.1f} tokens/s"
    typer.echo(f"{found['prompt_tokens']} + {found['new_tokens']} tokens; {rates}", err=True)


@app.command()
@rotation_options
def report(
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
    screen = _screen(ctx, as_json, verbose)
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
        page.write(found, out, steps.start("draw"))
    if as_json:
        screen.document({"ok": True, "out": str(out)} | found.to_dict())
    screen.show(_files_table(out.parent, [out.name]))


@app.command()
def inspect(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="An exported folder, an .onnx or a .pt2 file.")],
    beside: Annotated[Path | None, typer.Option("--with", help="Another one, to share a KV cache with.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Also read every file and compare its hash.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Show what an exported model says of itself: rotations, the basis of its cache, certificates, files, versions.

    Exits with 1 if its parts do not belong together, with 2 if the two cannot share a cache.
    """
    screen = _screen(ctx, as_json, verbose)
    found = read_artefact(path)
    found.check(files=check)
    if beside is not None:
        other = read_artefact(beside)
        other.check(files=check)
        found.require_same_basis(other)
    if as_json:
        screen.document({"ok": True} | found.to_dict())
    screen.show(*artefact_tables(found))
    if beside is not None:
        screen.show(f"shares a KV cache with {beside}")


def _sizes(text: str) -> list[int]:
    """Numbers separated by commas. ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--block-sizes {text!r} is not a list of numbers such as 64,128") from error


def _screen(ctx: typer.Context, as_json: bool, verbose: int) -> Screen:
    state: _State = ctx.obj
    state.screen, state.tracebacks = Screen(as_json=as_json, verbose=verbose > 0), verbose > 1
    return state.screen


def _onnx_compare() -> Any:
    try:
        from spinpass.exporters.onnx import compare_file
    except ModuleNotFoundError as error:
        raise ExportError(f"reading ONNX needs {error.name}: pip install 'spinpass[onnx]'") from error
    return compare_file


def _reporting() -> Any:
    """The pages, imported when they are needed: they draw with matplotlib."""
    try:
        from spinpass.reporting import page
    except ModuleNotFoundError as error:
        raise ExportError(f"a report needs {error.name}: pip install 'spinpass[report]'") from error
    return page


def _show(screen: Screen, result: Result) -> None:
    if result.plan is not None:
        _show_plan(screen, result.plan)
    if result.certificate is not None:
        screen.show(certificate_table(result.certificate, every_output=screen.verbose))


def _show_plan(screen: Screen, decided: RotationPlan) -> None:
    refused = refusal_table(decided, every_space=screen.verbose)
    screen.show(plan_table(decided, every_space=screen.verbose), *([refused] if refused else []))


def _report_lines(report: Any) -> list[str]:
    if isinstance(report, GptqReport):
        return [report.summary]
    proof = report.certificate.verdict if report.certificate is not None else f"not certified: {report.uncertified}"
    if report.path.suffix == ".pte":
        return [f"{report.delegates} delegates, {report.integer_layers} linear layers on integers; {proof}"]
    return [f"ONNX opset {report.opset}, {report.hadamards} online Hadamards; {proof}", *report.fused_lines()]


def _files_table(folder: Path, names: list[str]) -> Table:
    table = Table("file", "MB", title=str(folder), title_justify="left")
    table.columns[1].justify = "right"
    for name in names:
        table.add_row(name, f"{(folder / name).stat().st_size / 1e6:.2f}")
    return table


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__

"""Results of the commands as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from spinpass.evaluation import Comparison, Perplexity
from spinpass.folders import (
    IMPORTED,
    MARGIN,
    ExportRequest,
    Forecast,
    Result,
    free_memory,
    own_memory,
    plural,
    runtime_names,
)
from spinpass.loading import LoadingReport
from spinpass.planning import RotationPlan, grouped_refusals, grouped_spaces, online_parts
from spinpass.tuning import Tuned

from .screen import Screen
from .steps import in_bytes, in_time

_OUTPUTS_SHOWN = 8


def show_result(screen: Screen, result: Result) -> None:
    """Show the plan and the certificate, where there are any."""
    if result.plan is not None:
        show_plan(screen, result.plan)
    if result.certificate is not None:
        screen.show(certificate_table(result.certificate, every_output=screen.verbose))
    if result.quantization is not None and result.quantization.learning is not None:
        screen.show(result.quantization.learning.summary)


def show_loading(screen: Screen, report: LoadingReport) -> None:
    """Say on stderr what loading did beyond taking every tensor as it was saved."""
    for line in report.lines:
        screen.note(line)


def show_plan(screen: Screen, decided: RotationPlan) -> None:
    """Show what is rotated, and what is left alone."""
    refused = refusal_table(decided, every_space=screen.verbose)
    screen.show(plan_table(decided, every_space=screen.verbose), *([refused] if refused else []))


def plan_table(plan: RotationPlan, *, every_space: bool = False) -> Table:
    """The decisions of a plan; spaces that differ only in the layer share a line unless ``every_space``."""
    table = Table(title="Rotations", title_justify="left", caption_justify="left")
    for name in ("space", "rotation", "form", "online"):
        table.add_column(name, no_wrap=name in ("space", "rotation"))
    table.add_column("FLOP/token", justify="right")
    for name, spaces in grouped_spaces(plan, every_space=every_space).items():
        first = spaces[0]
        label = f"{name} ({len(spaces)}×)" if len(spaces) > 1 else name
        table.add_row(label, str(first.rotation), first.form, online_parts(spaces), f"{sum(s.flops for s in spaces):,}")
    total = f"{len(plan.spaces)} spaces, {plan.flops:,} FLOP per token and {plan.bytes_added:,} bytes added"
    table.caption = "\n".join([total, *plan.admissions, *_notes(plan)])
    return table


def forecast_table(forecast: Forecast, request: ExportRequest, *, every_step: bool = False) -> Table:
    """What an export takes, with ``every_step`` by step."""
    asked = request.quantize or ("--int4" if request.int4 else f"{request.bits} bits")
    table = Table(
        "", "", title=f"spinpass export, {asked}", title_justify="left", caption_justify="left", show_header=False
    )
    there = request.memory_bytes or free_memory() + own_memory()
    whole, runtime = forecast.memory_bytes + IMPORTED, forecast.runtime_bytes + IMPORTED  # with what is imported
    needs = f"{in_bytes(whole)} ± {MARGIN:.0%}" if forecast.exact else f"{in_bytes(whole)} at least"
    fits = "" if forecast.least_bytes + IMPORTED <= there else ": it does not fit"
    table.add_row("peak memory", f"{needs}, of {in_bytes(there)}{fits}")
    if runtime > whole:
        left = ": it is not run here" if runtime > there else ""
        table.add_row("with the file in its runtime", f"{in_bytes(runtime)}{left}")
    table.add_row("read, written", f"{in_bytes(forecast.read_bytes)}, {in_bytes(forecast.written_bytes)}")
    table.add_row("free disk needed", in_bytes(forecast.disk_bytes))
    table.add_row("time", f"about {in_time(forecast.seconds)}, half to twice as long")
    if every_step:
        for step in forecast.steps:
            table.add_row(f"  {step.name}", f"{in_time(step.seconds)}, {in_bytes(step.bytes)}")
    return table


def refusal_table(plan: RotationPlan, *, every_space: bool = False) -> Table | None:
    """What is left alone and why; None where everything is rotated."""
    if not plan.refusals:
        return None
    table = Table("left alone", "why", title="Refused", title_justify="left")
    for (what, why), count in grouped_refusals(plan, every_space=every_space).items():
        table.add_row(f"{what} ({count}×)" if count > 1 else what, why)
    return table


def certificate_table(certificate: Mapping[str, Any], *, every_output: bool = False) -> Table:
    """The errors of every output, from ``Certificate.to_dict()``. The worst come first; the rest is counted unless
    ``every_output``.
    """
    native = certificate["dtype"]
    headings = ("output", "max |ref|", "float64 error", "argmax", f"{native} error", "argmax", "")
    table = Table(*headings, title="Certificate", title_justify="left", caption_justify="left")
    for column in table.columns[1:6]:
        column.justify = "right"
    outputs = sorted(certificate["outputs"], key=lambda o: (o["ok"], o["float64"]["argmax"] is None))
    shown = outputs if every_output else outputs[:_OUTPUTS_SHOWN]
    for output in shown:
        verdict = Text("ok", "green") if output["ok"] else Text("FAIL", "red")
        table.add_row(
            output["name"], *_difference(output["float64"], scale=True), *_difference(output["native"]), verdict
        )
    rest = f" ({len(outputs) - len(shown)} more outputs)" if len(outputs) > len(shown) else ""
    table.caption = f"{certificate['verdict']}{rest}\nclosed loop: {certificate['closed_loop']}"
    if certificate.get("coverage"):  # records of earlier versions have none
        table.caption += "\nnot reached: " + "; ".join(certificate["coverage"])
    return table


def comparison_table(
    main: Perplexity | Comparison, files: Mapping[str, Comparison], text: str, windows: int, length: int
) -> Table:
    """Perplexities with their standard errors, and how the models differ, a line for each. ``text``: what they read."""
    table = Table(title=f"Perplexity on {text}", title_justify="left", caption_justify="left")
    table.caption = f"{windows} windows of {length} tokens; ± one standard error over windows, ratios paired"
    compared = dict(files) if isinstance(main, Perplexity) else {"after": main, **files}
    table.add_column("", overflow="fold")
    for name in ("perplexity", *(("÷ before", "same token", "KL, nats per token") if compared else ())):
        table.add_column(name, no_wrap=True)
    first = main if isinstance(main, Perplexity) else main.before
    table.add_row("before" if compared else "model", f"{first.value:.4f} ± {first.error:.4f}")
    for name, each in compared.items():
        ratio = f"{each.ratio:.4f} ± {each.ratio * each.change.error:.4f}"
        after = f"{each.after.value:.4f} ± {each.after.error:.4f}"
        table.add_row(name, after, ratio, f"{each.agreement:.2%}", f"{each.divergence:.5f}")
    return table


def tuning_table(found: Tuned, scheme: str, windows: int, length: int) -> Table:
    """What every trial costs and what it is worth; the chosen one is bold."""
    table = Table("rotation", "spaces", "FLOP/token", "perplexity ÷ original", "KL", "same token", title_justify="left")
    table.title, table.caption_justify = f"Tuning for {scheme}", "left"
    table.caption = f"{windows} held-out windows of {length} tokens; ± one standard error over windows, paired"
    for trial in found.trials:
        seen = trial.comparison
        kept = "" if trial.plan is None else f"{len(trial.plan.spaces)} of {len(trial.spaces)}"
        numbers = f"{seen.ratio:.4f} ± {seen.ratio * seen.change.error:.4f}", f"{seen.divergence:.5f}"
        style = "bold" if trial is found.chosen else None
        table.add_row(trial.name, kept, f"{trial.flops:,}", *numbers, f"{seen.agreement:.2%}", style=style)
    return table


def files_table(folder: Path, names: list[str]) -> Table:
    """Files of the folder and their sizes."""
    table = Table("file", "MB", title=str(folder), title_justify="left")
    table.columns[1].justify = "right"
    for name in names:
        table.add_row(name, f"{(folder / name).stat().st_size / 1e6:.2f}")
    return table


def trial_lines(trials: Iterable[Mapping[str, Any]]) -> list[str]:
    """What became of the folder in its runtimes, for people."""
    run = [trial for trial in trials if trial["error"] is not None]
    tokens, cases = sum(trial["tokens"] for trial in run), len(run)
    what = f"{tokens} tokens in {plural(cases, 'case')}, as the program has them"
    found = [f"tried in {runtime_names(run)}: {what}"] if run else []
    left = dict.fromkeys(f"{t['runtime']}, {t['case']}: {t['reason']}" for t in trials if t["reason"])
    return [*found, *(f"not compared: {each}" for each in left)]


def _notes(plan: RotationPlan) -> list[str]:
    return sorted({note for space in plan.spaces for note in space.notes})


def _difference(data: Mapping[str, Any], *, scale: bool = False) -> tuple[str, ...]:
    argmax = "" if data["argmax"] is None else f"{data['argmax']:.1%}"
    cells = (f"{float(data['error']):.1e}", argmax)
    return (f"{float(data['scale']):.3g}", *cells) if scale else cells

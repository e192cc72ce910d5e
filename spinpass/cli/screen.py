"""What the command line shows: progress and messages on stderr, one table or one JSON document on stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display
from rich.table import Table

from spinpass.evaluation import Comparison, Perplexity
from spinpass.planning import RotationPlan, grouped_refusals, grouped_spaces, online_parts
from spinpass.progress import Progress, Silent
from spinpass.tuning import Tuned

_OUTPUTS_SHOWN = 8
_LOG = logging.getLogger("spinpass")
_PIPE_WIDTH = 140  # where there is no terminal to ask


class Screen:
    """Where one command writes. ``as_json``: the result is JSON. ``verbose``: the pass log, and nothing shortened."""

    def __init__(self, *, as_json: bool = False, verbose: bool = False) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.out, self.err = (
            Console(file=file, width=None if file.isatty() else _PIPE_WIDTH) for file in (sys.stdout, sys.stderr)
        )
        self._handler = RichHandler(console=self.err, show_path=False) if verbose else None
        if self._handler is not None:
            _LOG.addHandler(self._handler)
            _LOG.setLevel(logging.DEBUG)

    def close(self) -> None:
        """Stop logging."""
        if self._handler is not None:
            _LOG.removeHandler(self._handler)
            _LOG.setLevel(logging.NOTSET)

    @contextmanager
    def steps(self) -> Iterator[ShownSteps]:
        """A progress display for the steps of a command, removed at the end; their times stay."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Display(*columns, console=self.err, transient=True) as display:
            steps = ShownSteps(display)
            try:
                yield steps
            finally:
                steps.finish()
        self.note("  ".join(f"{name} {seconds:.1f} s" for name, seconds in steps.seconds.items()))

    def note(self, text: str) -> None:
        """One line on stderr, for people."""
        if text:
            self.err.print(text, style="dim", highlight=False, markup=False)

    def error(self, text: str, kind: str) -> None:
        """One line on stderr, and in JSON mode the document that says so."""
        self.err.print(f"spinpass: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
        if self.as_json:
            self.document({"ok": False, "error": kind, "message": text})

    def show(self, *renderables: object) -> None:
        """The result for people; nothing in JSON mode."""
        if not self.as_json:
            for renderable in renderables:
                self.out.print(renderable, highlight=False)

    def document(self, data: Any) -> None:
        """The result as one JSON document."""
        self.out.file.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


class ShownSteps(Silent):
    """The steps of a command, one after the other, with their wall-clock ``seconds``."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display
        self._task = display.add_task("", total=None)

    def start(self, name: str, /) -> Progress:
        """See :meth:`spinpass.progress.Steps.start`."""
        super().start(name)
        self._display.reset(self._task, description=name, total=None)
        return lambda done, total: self._display.update(self._task, completed=done, total=total)


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
    table.caption = "\n".join([total, *_notes(plan)])
    return table


def refusal_table(plan: RotationPlan, *, every_space: bool = False) -> Table | None:
    """What is left alone and why, or None."""
    if not plan.refusals:
        return None
    table = Table("left alone", "why", title="Refused", title_justify="left")
    for (what, why), count in grouped_refusals(plan, every_space=every_space).items():
        table.add_row(f"{what} ({count}×)" if count > 1 else what, why)
    return table


def certificate_table(certificate: Mapping[str, Any], *, every_output: bool = False) -> Table:
    """Errors per output of ``Certificate.to_dict()``: the worst first, the rest counted unless ``every_output``."""
    native = certificate["dtype"]
    headings = ("output", "max |ref|", "float64 error", "argmax", f"{native} error", "argmax", "")
    table = Table(*headings, title="Certificate", title_justify="left", caption_justify="left")
    for column in table.columns[1:6]:
        column.justify = "right"
    outputs = sorted(certificate["outputs"], key=lambda o: (o["ok"], o["float64"]["argmax"] is None))
    shown = outputs if every_output else outputs[:_OUTPUTS_SHOWN]
    for output in shown:
        verdict = "[green]ok[/]" if output["ok"] else "[red]FAIL[/]"
        table.add_row(
            output["name"], *_difference(output["float64"], scale=True), *_difference(output["native"]), verdict
        )
    rest = f" ({len(outputs) - len(shown)} more outputs)" if len(outputs) > len(shown) else ""
    table.caption = f"{certificate['verdict']}{rest}\nclosed loop: {certificate['closed_loop']}"
    return table


def comparison_table(
    main: Perplexity | Comparison, files: Mapping[str, Comparison], windows: int, length: int
) -> Table:
    """Perplexities with their standard errors, and how models differ: a line for each."""
    table = Table(title="Perplexity", title_justify="left", caption_justify="left")
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
    """What every trial costs and what it is worth; the chosen one in bold."""
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


def _notes(plan: RotationPlan) -> list[str]:
    return sorted({note for space in plan.spaces for note in space.notes})


def _difference(data: Mapping[str, Any], *, scale: bool = False) -> tuple[str, ...]:
    argmax = "" if data["argmax"] is None else f"{data['argmax']:.1%}"
    cells = (f"{float(data['error']):.1e}", argmax)
    return (f"{float(data['scale']):.3g}", *cells) if scale else cells

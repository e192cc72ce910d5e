"""Other tools beside spinpass, on the same weights, by the bytes of their files: ``python -m benchmarks.peers``.

A row is a command that anyone can give, see :mod:`.makers`; its file is scored in the runtime that it is for, on the
texts of :mod:`benchmarks.texts` and what ``--text NAME=FILE`` names. No tool is calibrated on any of them: one that
reads a text is given that of the package. Rows are kept in ``--out`` and taken from there by the
next run. Speeds are CPU time on one thread, the files in turns, with the logits of all positions of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.offgrid import SPREADS, packaged_gguf
from benchmarks.pictures.pareto import draw_rows
from benchmarks.texts import scored_texts
from benchmarks.timing import PHASES, Work, compared, measured
from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.evaluation import SHIPPED_TEXT
from spinpass.progress import Steps

from .environments import PACKAGES, Environments
from .makers import Tuning, Workshop
from .rows import Bench
from .scoring import contender
from .source import Float, written

ROWS = (
    "spinpass:float",
    "spinpass:8",
    "spinpass:4",
    "spinpass:4/plain",
    "spinpass:3",
    "spinpass:2",
    "genai:fp32",
    "genai:default",
    "genai:rtn",
    "genai:rtn_last",
    "genai:k_quant",
    "genai:k_quant_last",
    "genai:k_quant_mixed",
    "genai:rtn/128",
    "olive:gptq/32",
    "olive:gptq/32/head8",
    "olive:gptq/128",
    "autoround:w4/32",
    "autoround:w4/32/head8",
    "autoround:w4/128",
    "llama:Q8_0",
    "llama:Q4_K_M",
    "llama:Q4_0",
)


def main(
    spread: Annotated[float, typer.Option(help="Of the off-grid weights; 1 keeps those of the file.")] = SPREADS[-1],
    gguf: Annotated[Path | None, typer.Option(help="The model, of the Llama family; the demo's if none.")] = None,
    rows: Annotated[str, typer.Option(help="TOOL:WAY, separated by commas.")] = ",".join(ROWS),
    env: Annotated[list[str] | None, typer.Option(help="TOOL=PYTHON of an environment; may be repeated.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="TOOL:WAY=PATH that is made already; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE to score on as well; may be repeated.")] = None,
    texts: Annotated[str, typer.Option(help="Names of the texts to score on; all if none.")] = "",
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each window.")] = 512,
    repeats: Annotated[int, typer.Option(help="Rounds of every timing; 0 times nothing.")] = 5,
    prompt: Annotated[int, typer.Option(help="Tokens of the timed prompt.")] = 256,
    new: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 32,
    iterations: Annotated[int, typer.Option(help="Of AutoRound at each layer.")] = Tuning.iterations,
    batch: Annotated[int, typer.Option(help="Windows that AutoRound trains on at a time.")] = Tuning.batch,
    samples: Annotated[int, typer.Option(help="Windows that AutoRound calibrates on.")] = Tuning.samples,
    again: Annotated[bool, typer.Option("--again", help="Make rows anew that are kept.")] = False,
    out: Annotated[Path, typer.Option(help="Where environments, models and rows are kept.")] = Path("out/peers"),
    picture: Annotated[Path | None, typer.Option(help="SVG file to draw; in --out if none.")] = None,
    kept: Annotated[Path | None, typer.Option(help="Show and draw what this JSON document holds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure, print and draw."""
    torch.set_num_threads(1)
    screen = Screen(as_json=as_json)
    if kept is not None:
        document = json.loads(kept.read_text(encoding="utf-8"))
    else:
        shop = Workshop(
            written((gguf or packaged_gguf()).resolve(), out.resolve(), spread, SHIPPED_TEXT),
            Environments(out.resolve() / "environments", interpreters(env or ())),
            Tuning(iterations, batch, samples),
        )
        scored = chosen(scored_texts(text or ()), texts)
        cut = {n: evaluation.windows(shop.source.tokenize(each), length, windows) for n, each in scored.items()}
        bench = Bench(shop, Float(shop.source, out / "float"), cut, out / f"rows-{spread}", again, there(file or ()))
        about = {"spread": spread, "windows": windows, "length": length, "weights": shop.source.weights}
        with screen.steps() as steps:
            found = [bench.row(row.strip(), steps) for row in rows.split(",") if row.strip()]
            work = Work(prompt, new, repeats, 1)
            document = about | {"timing": work.to_dict(), "rows": timed(found, work, shop, steps)}
        (out / "result.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    if as_json:
        screen.document(document)
    screen.show(*tables(document))
    draw_picture(document, picture or out / "peers.svg")


def chosen(texts: Mapping[str, str], names: str) -> dict[str, str]:
    """The texts that are named, separated by commas; all of them where none is. Raises BadParameter for another."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(texts)
    if unknown := [name for name in wanted if name not in texts]:
        raise typer.BadParameter(f"there is no text {unknown[0]!r}: {', '.join(texts)} are", param_hint="--texts")
    return {name: texts[name] for name in wanted}


def interpreters(named: Sequence[str]) -> dict[str, str]:
    """What ``--env`` names, by tool. Raises BadParameter where it names nothing."""
    found = {}
    for each in named:
        tool, _, python = each.partition("=")
        if tool not in PACKAGES or not python:
            known = ", ".join(PACKAGES)
            raise typer.BadParameter(f"{each!r} is not TOOL=PYTHON with one of {known}", param_hint="--env")
        found[tool] = python
    return found


def there(named: Sequence[str]) -> dict[str, Path]:
    """What ``--file`` names, by row. Raises BadParameter where there is no such file or folder."""
    found = {}
    for each in named:
        row, _, path = each.partition("=")
        if not path or not Path(path).exists():
            raise typer.BadParameter(f"{each!r} is not TOOL:WAY=PATH of a file that is there", param_hint="--file")
        found[row] = Path(path).resolve()
    return found


def timed(rows: Sequence[dict[str, Any]], work: Work, shop: Workshop, steps: Steps) -> list[dict[str, Any]]:
    """The rows with tokens per second, and how many times those of the first one that has a file."""
    whole = [row for row in rows if "error" not in row]
    if not work.repeats or not whole:
        return list(rows)
    contenders = {row["row"]: contender(Path(row["path"]), shop) for row in whole}
    times = measured(contenders, work, steps.start("time"))
    base = times[whole[0]["row"]]
    tokens = dict(zip(PHASES, (1, work.prompt)))
    speeds = {name: compared(each, base) for name, each in times.items()}
    rates = {n: {p: tokens[p] / found["seconds"] for p, found in each.items()} for n, each in speeds.items()}
    return [row | {"rates": rates.get(row["row"], {}), "speed": speeds.get(row["row"], {})} for row in rows]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """What the files are worth, and what is in them."""
    rows = document["rows"]
    texts = next((list(row["ratios"]) for row in rows if "ratios" in row), [])
    worth = Table("", "MB", "bits/weight", *texts, "KL", "top-1", "decode", "prefill", title_justify="left")
    worth.title, worth.caption_justify = "Perplexity ÷ float; tokens per second", "left"
    timing, windows = document["timing"], f"{document['windows']} windows of {document['length']} tokens of each text"
    worth.caption = (
        f"spread {document['spread']}; {windows}; CPU time on one thread, median of {timing['repeats']} rounds in "
        f"turns, {timing['new']} tokens after a prompt of {timing['prompt']}, logits of all its positions"
    )
    inside = Table("", "stored", "asked for", "version", "CPU minutes", title="What is in the files")
    inside.title_justify = "left"
    for row in rows:
        if "error" in row:
            worth.add_row(row["row"], "", "", *[""] * len(texts), "", "", "", "")
            inside.add_row(row["row"], f"does not run here: {row['error']}", "", "", "")
            continue
        ratios = [f"{row['ratios'][t]:.4f} ± {row['errors'][t]:.4f}" for t in texts]
        rates = [f"{row['rates'][p]:.1f}" if p in row.get("rates", {}) else "" for p in PHASES]
        sizes = (f"{row['bytes'] / 1e6:.1f}", f"{row['bits_per_weight']:.2f}")
        worth.add_row(row["row"], *sizes, *ratios, f"{row['kl']:.4f}", f"{row['agreement']:.1%}", *rates)
        version = " ".join(next(iter(row["versions"].items()), ()))  # of the tool; the document has those beside it
        minutes = "" if row["cpu_minutes"] is None else f"{row['cpu_minutes']:.1f}"
        inside.add_row(row["row"], row["stored"], row["asked"], version, minutes)
    return [worth, inside]


def draw_picture(document: Mapping[str, Any], path: Path) -> None:
    """Draw the rows of a document into an SVG file."""
    about = f"{document['weights'] / 1e6:.1f}M weights on no grid, spread {document['spread']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(draw_rows(document["rows"], about), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

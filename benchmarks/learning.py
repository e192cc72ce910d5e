"""What learning is worth: ``python -m benchmarks.learning``.

    off-grid weights  ->  Hadamards  |  balanced  |  and scales distilled  |  all that learns  ->  perplexity ÷ float

The weights are those of :mod:`benchmarks.offgrid`. Rounded programs are simulated, as their kernels would compute, so
that schemes without kernels can be told apart; what files of recipes do in ONNX Runtime is the yardstick's to say
(``python -m benchmarks.yardstick --rows "4,4//--learn full"``). Learned from is the text of the package, what is kept
is decided on Python's documentation, and scored are other texts. Every variant is scored on the same windows, and
compared with the one before it window by window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.floats import Floats, off_the_grid, scored_floats
from benchmarks.offgrid import SPREADS
from spinpass import Learning, RotationConfig, evaluation, learn, transform
from spinpass.cli.screen import Screen
from spinpass.evaluation import SHIPPED_TEXT, ProgramScorer, calibration_inputs, learning_text
from spinpass.folders import recipe_of
from spinpass.learned import balance, balances
from spinpass.learning import LearningRecord
from spinpass.progress import Steps
from spinpass.quantization import QuantizationConfig, quantize

SCHEMES = ("w4-asym-gptq-a8-kv4", "a4-kv4", "w4-asym-gptq-a4-kv4")
HADAMARD, BALANCED, BOTH, DISTILLED, LEARNED = "Hadamard", "balanced", "balanced, distilled", "distilled", "learned"
_LENGTH, _POSITIONS = 512, 512
_WINDOWS = recipe_of("auto", 4, "onnx").windows  # as many as exports have, and so as many decide what is kept
_BASES = Learning(("transforms",), ("local",))
_CONFIG = RotationConfig(form="online", verify=False)


@dataclass(frozen=True)
class Balanced:
    """What keys and channels are balanced by, what was said of it, and its CPU time."""

    config: RotationConfig
    record: LearningRecord
    minutes: float


@dataclass(frozen=True)
class Trained:
    """One variant of a scheme: its losses by text, what was said of learning, and the CPU time of making it."""

    losses: Mapping[str, evaluation.Perplexity]
    said: Sequence[str]
    minutes: float


def main(
    spread: Annotated[float, typer.Option(help="Of the off-grid weights; 1 keeps those of the file.")] = SPREADS[-1],
    gguf: Annotated[Path | None, typer.Option(help="The model, of the Llama family; the demo's if none.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder or name to take as it is, in place of a GGUF file.")
    ] = None,
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(SCHEMES),
    kinds: Annotated[str, typer.Option(help="What is learned, separated by commas.")] = "transforms,scales,offsets",
    rounds: Annotated[int, typer.Option(help="Rounds through the text.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Minutes for the bases, and for the numbers.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of what is learned.")] = 1,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE to score on as well; may be repeated.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of each text, of 512 tokens.")] = 8,
    out: Annotated[Path, typer.Option(help="Where the model is kept.")] = Path("out/learning"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    screen = Screen(as_json=as_json)
    asked = Learning(tuple(kinds.split(",")), rounds=rounds, minutes=minutes)
    with screen.steps() as steps:
        spread = spread if model is None else 1.0
        model = model or off_the_grid(out, gguf, spread, steps)
        floats = scored_floats(model, text or (), _LENGTH, windows, steps)
        rows: list[dict[str, Any]] = []
        for scheme in schemes.split(","):
            before: Trained | None = None
            rounds = balances(QuantizationConfig.parse(scheme))
            bare, both = ((HADAMARD, BALANCED), (BOTH,)) if rounds else ((HADAMARD,), ())
            balanced: Balanced | None = None
            for variant in (*bare, *both, DISTILLED, *(f"{LEARNED}, seed {seed}" for seed in range(seeds))):
                settings = _settings(variant, asked, scheme)
                if variant == BALANCED:
                    balanced = _balanced(floats, scheme, steps)
                if settings is not None or variant in bare:
                    begun = balanced if variant in (BALANCED, BOTH) else None
                    made = _made(floats, scheme, settings, steps, begun)
                    rows.append({"scheme": scheme, "variant": variant, **_row(made, floats.losses, before)})
                    before = before if variant.startswith(LEARNED) else made
    if as_json:
        screen.document({"model": model, "spread": spread, "windows": windows, "rows": rows})
    screen.show(_table(rows, f"spread {spread}; {windows} windows of {_LENGTH} tokens of each text; simulated"))


def _settings(variant: str, asked: Learning, scheme: str) -> Learning | None:
    """What is learned; None where nothing is, or a scheme has no scales to distill."""
    rounds_weights = QuantizationConfig.parse(scheme).weights is not None
    if variant in (HADAMARD, BALANCED) or (variant in (BOTH, DISTILLED) and not rounds_weights):
        return None
    if variant in (BOTH, DISTILLED):
        return Learning()
    return replace(asked, seed=int(variant.split()[-1]))


def _balanced(floats: Floats, scheme: str, steps: Steps) -> Balanced:
    """What keys and channels are balanced by, for several variants."""
    began = time.process_time()
    read = learning_text(floats.loaded.program, floats.tokenize, SHIPPED_TEXT, None, _WINDOWS, _POSITIONS)
    parsed = QuantizationConfig.parse(scheme)
    config, record = balance(floats.loaded.program, _CONFIG, parsed, read.shown, read.held_out, steps)
    return Balanced(config, record, (time.process_time() - began) / 60)


def _made(floats: Floats, scheme: str, settings: Learning | None, steps: Steps, begun: Balanced | None) -> Trained:
    """Rotate, learn, round and score."""
    began = time.process_time()
    tokenize, program = floats.tokenize, floats.loaded.program
    calibration = calibration_inputs(program, tokenize, SHIPPED_TEXT, _LENGTH, _WINDOWS)
    read = learning_text(program, tokenize, SHIPPED_TEXT, settings, len(calibration), _POSITIONS)
    options: dict[str, Any] = {"training": read.shown, "held_out": read.held_out, "steps": steps}
    config = _CONFIG if begun is None else begun.config
    records: list[LearningRecord | None] = [] if begun is None else [begun.record]
    if settings is None:
        tick = steps.start(f"quantize {scheme}")
        quantized = quantize(transform(program, config), scheme, calibration, progress=tick)
    else:
        bases = replace(_BASES, seed=settings.seed, minutes=settings.minutes)
        found = learn(program, scheme, calibration, config=config, settings=settings, bases=bases, **options)
        quantized, records = found.quantized, [*records, found.bases, found.numbers]
    minutes = (time.process_time() - began) / 60 + (0 if begun is None else begun.minutes)
    scorer = ProgramScorer(quantized.program)
    losses = {n: evaluation.perplexity(scorer, w, steps.start(f"score {scheme}, {n}")) for n, w in floats.cut.items()}
    said = [each.summary for each in records if each is not None]
    return Trained(losses, said, minutes)


def _row(made: Trained, floats: Mapping[str, evaluation.Perplexity], before: Trained | None) -> dict[str, Any]:
    """The ratios to the floats and, window by window, to the variant before."""
    found: dict[str, Any] = {"said": list(made.said), "cpu_minutes": made.minutes, "ratios": {}, "to_before": {}}
    for name, losses in made.losses.items():
        for key, reference in (("ratios", floats), ("to_before", before.losses if before is not None else {})):
            if name in reference:
                change = evaluation.change(reference[name], losses)
                ratio = math.exp(change.mean)
                found[key][name] = [ratio, ratio * change.error]
    return found


def _table(rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
    names = list(rows[0]["ratios"]) if rows else []
    table = Table("scheme", "variant", *names, *(f"÷ before, {n}" for n in names), "CPU minutes", title_justify="left")
    table.title, table.caption, table.caption_justify = "Perplexity ÷ float", caption, "left"
    for row in rows:
        cells = [f"{ratio:.4f} ± {error:.4f}" for ratio, error in row["ratios"].values()]
        steps = [f"{ratio:.4f} ± {error:.4f}" for ratio, error in row["to_before"].values()] or [""] * len(names)
        table.add_row(row["scheme"], row["variant"], *cells, *steps, f"{row['cpu_minutes']:.1f}")
    return table


if __name__ == "__main__":
    typer.run(main)

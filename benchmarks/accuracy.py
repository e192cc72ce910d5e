"""What rotation buys: perplexity of quantized programs, untouched and rotated, over the same windows.

Every scheme is applied to the model as it is, and to the model rotated: with R1 in the residual stream (``offline``),
at the inputs of the linear layers (``online``), or there and across heads at the output projections
(``online+heads``); ``tuned`` is what :func:`spinpass.tuning.tune` chooses on text between the windows of calibration.
All are scored on the same windows; the ratio is to the perplexity of the unquantized model, its standard error that of
the paired difference. Schemes that begin with ``ort:`` are exported, packed and run by the
integer kernels of ONNX Runtime; the others are simulated in the graph (:mod:`spinpass.quantization`). Embedding and
head stay as they are unless a scheme names them. Finished cells are kept under ``out/accuracy`` and not measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch.export import ExportedProgram

import spinpass
from examples.demo import packaged_model
from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.config import ROLES, RotationConfig
from spinpass.evaluation import OnnxScorer, ProgramScorer, open_scorer
from spinpass.exporters import onnx as exporter
from spinpass.exporters.onnx import pack_weights
from spinpass.quantization import Quantized, quantize
from spinpass.tuning import tune

ORT = "ort:"  # in front of a scheme: the exported file with integers, in ONNX Runtime
SCHEMES = ("ort:w8-gptq-a8", "ort:w8-gptq-a8static", "ort:w4g128-gptq-a8-distill", "w4-asym-gptq-distill",
           "w4-asym-gptq-a8-kv4-distill", "a4-kv4", "w4-asym-gptq-a4-kv4-distill", "w4g32-gptq")  # fmt: skip
TUNED = "tuned"
DECISIVE = 16  # windows that tuning decides on
VARIANTS: dict[str, RotationConfig | None] = {
    "untouched": None,
    "online": RotationConfig(form="online", verify=False),
    "online+heads": RotationConfig(form="online", rotations=ROLES, verify=False),
    "offline": RotationConfig(form="offline", verify=False),
}
SHOWN = ("untouched", "online+heads")  # unless told otherwise


def main(
    model: Annotated[str, typer.Option(help="Folder, hub name or GGUF file; the demo's model if none.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on; else the other help topics.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to score on; else every other topic of help().")] = None,
    schemes: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(SCHEMES),
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)} and {TUNED}.")] = ",".join(SHOWN),
    windows: Annotated[int, typer.Option(help="Windows that are scored.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    samples: Annotated[int, typer.Option(help="Windows to calibrate on.")] = 16,
    out: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = Path("out/accuracy"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure the grid and print it."""
    chosen = [s.strip() for s in variants.split(",")]
    unknown = sorted(set(chosen) - {*VARIANTS, TUNED})
    if unknown:
        listed = f"{', '.join(VARIANTS)}, {TUNED}"
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {listed}", param_hint="--variants")
    screen = Screen(as_json=as_json)
    with screen.steps() as steps:
        name = model or packaged_model()
        opened = open_scorer(name, progress=steps.begin)
        if opened.program is None:
            raise typer.BadParameter(f"{name} is an ONNX model; name what it was made of", param_hint="--model")
        read = evaluation.windows(opened.tokens(_text(text, 0)), length, windows)
        ids = opened.tokens(_text(calibration, 1))
        shown = evaluation.windows(ids, length, samples)
        decisive = evaluation.windows(_between(ids, length, samples), length, DECISIVE) if TUNED in chosen else []
        grid = _Grid(opened.program, read, shown, decisive, out, steps)
        base = grid.cell("none", "untouched")
        wanted = [s.strip() for s in schemes.split(",")]
        cells = {scheme: {v: grid.cell(scheme, v) for v in chosen} for scheme in wanted}
    rows = {s: {v: _ratio(base, cell) | cell for v, cell in by.items()} for s, by in cells.items()}
    for by in rows.values():
        others = [cell for v, cell in by.items() if v != TUNED]
        if TUNED in by and others:
            best = min(others, key=lambda cell: cell["ratio"])
            by[TUNED]["over_best"] = _ratio(best, by[TUNED])
    if as_json:
        screen.document({"model": name, "windows": windows, "length": length, "unquantized": base, "schemes": rows})
    screen.show(_table(rows, chosen, windows, length, evaluation.Perplexity(tuple(base["losses"]), 0).value))


class _Grid:
    """Cells of (scheme, variant), measured or read from disk."""

    def __init__(
        self,
        program: ExportedProgram,
        read: list[list[int]],
        shown: list[list[int]],
        decisive: list[list[int]],
        out: Path,
        steps: Any,
    ) -> None:
        self.programs = {"untouched": program}
        self.read, self.shown, self.decisive, self.out, self.steps = read, shown, decisive, out, steps
        self.key = _digest(program, read, shown)

    def cell(self, scheme: str, variant: str) -> dict[str, Any]:
        """Losses per window, and what quantizing cost."""
        path = self.out / self.key / f"{scheme}@{variant}.json"
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found = dict[str, Any]()
        with TemporaryDirectory() as folder:
            scorer: evaluation.Scorer = ProgramScorer(self.programs["untouched"])
            if scheme != "none":
                started = time.perf_counter()
                made, about = self._made(scheme.removeprefix(ORT), variant)
                found |= {"seconds": time.perf_counter() - started, "bytes": made.report.bytes_after} | about
                self.steps.start(f"export {scheme}, {variant}")
                scorer = _in_ort(made, Path(folder)) if scheme.startswith(ORT) else ProgramScorer(made.program)
            tick = self.steps.start(f"score {scheme}, {variant}")
            found |= {"losses": list(evaluation.perplexity(scorer, self.read, tick).losses)}
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}.tmp")
        staging.write_text(json.dumps(found), encoding="utf-8")
        os.replace(staging, path)
        return found

    def _made(self, scheme: str, variant: str) -> tuple[Quantized, dict[str, Any]]:
        """Quantized, and how it was chosen."""
        if variant == TUNED:
            tuned = tune(self.programs["untouched"], scheme, self.shown, self.decisive, steps=self.steps)
            return tuned.quantized, {
                "chosen": tuned.chosen.name,
                "trials": {trial.name: trial.comparison.ratio for trial in tuned.trials},
            }
        program = self._program(variant)
        tick = self.steps.start(f"quantize {scheme}, {variant}")
        calibration = [ProgramScorer(program).inputs(ids) for ids in self.shown]
        return quantize(program, scheme, calibration, progress=tick), {}

    def _program(self, variant: str) -> ExportedProgram:
        if variant not in self.programs:
            self.programs = {"untouched": self.programs["untouched"]}  # one rotated copy at a time
            self.steps.start(f"rotate, {variant}")
            self.programs[variant] = spinpass.transform(self.programs["untouched"], VARIANTS[variant])
        return self.programs[variant]


def _in_ort(made: Quantized, folder: Path) -> OnnxScorer:
    """The exported file, its weights packed; ``MatMulNBits`` rounds activations itself where the scheme rounds them."""
    exporter.export(made.program, folder / "simulated", verify=False)
    level = 4 if made.report.activations else 0
    report = pack_weights(folder / "simulated", folder / "packed", made.report.weights, accuracy_level=level)
    return OnnxScorer(made.program, report.path)


def _text(path: Path | None, half: int) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    names = sorted(topics)
    return "\n\n".join(topics[n] for n in names[half::2])


def _between(ids: Sequence[int], length: int, count: int) -> list[int]:
    """The tokens that :func:`evaluation.windows` leaves out."""
    step = len(ids) // count
    return [token for start in range(0, count * step, step) for token in ids[start + length : start + step]]


def _digest(program: ExportedProgram, *tokens: Sequence[Sequence[int]]) -> str:
    """Of the weights (a sample of each), the tokens, and the sources of the package."""
    hashed = hashlib.sha256(json.dumps(tokens).encode())
    for name, tensor in program.state_dict.items():
        hashed.update(name.encode() + tensor.detach().flatten()[:64].float().numpy().tobytes())
    for path in sorted(Path(spinpass.__file__).parent.rglob("*.py")):
        if "exporters" not in path.parts:
            hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def _ratio(base: dict[str, Any], cell: dict[str, Any]) -> dict[str, float]:
    """Perplexity over the unquantized one's, and its standard error over windows."""
    before, after = (evaluation.Perplexity(tuple(c["losses"]), 0) for c in (base, cell))
    change = evaluation.change(before, after)
    ratio = math.exp(change.mean)
    return {"ratio": ratio, "standard_error": ratio * change.error}


def _text_of(cell: dict[str, Any]) -> str:
    text = _with_error(cell)
    if "over_best" in cell:
        text += f"\n{cell['chosen']}; ÷ best {_with_error(cell['over_best'])}"
    return text


def _with_error(figures: dict[str, Any]) -> str:
    return f"{figures['ratio']:.4f} ± {figures['standard_error']:.4f}"


def _table(rows: dict[str, dict[str, Any]], variants: list[str], windows: int, length: int, base: float) -> Table:
    table = Table("scheme", *variants, title="Perplexity ÷ unquantized", title_justify="left", caption_justify="left")
    for scheme, by in rows.items():
        table.add_row(scheme, *(_text_of(by[v]) for v in variants))
    table.caption = f"{windows} windows of {length} tokens; unquantized perplexity {base:.3f}"
    return table


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)

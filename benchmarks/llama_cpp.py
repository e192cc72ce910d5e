"""How llama.cpp, which one would fetch instead, does with the same weights: ``python -m benchmarks.llama_cpp``.

The GGUF file is run by llama.cpp as it is and with its weights rounded to Q4_0; what ``spinpass export`` makes of the
same file is run by ONNX Runtime: ``--int4`` with and without rotation and, where ``--quantize`` names one, a scheme
with R1 online.
Perplexity is over the same windows of tokens, every token but the first of a window predicted from those before it;
the reference is the float32 values that the GGUF file stands for. Prefill and decoding are timed as in
:mod:`benchmarks.timing`, in turns. llama.cpp computes the logits of a prompt's last token, an exported graph those of
all tokens: the row "all logits" has llama.cpp do the same. Several threads are timed by the wall clock and wait for
each other in loops: that says nothing on a machine whose cores are not idle.

``--python`` names the interpreter of an environment with llama-cpp-python (``pip install llama-cpp-python`` compiles
it, which takes a quarter of an hour of CPU time); it need not have anything else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.timing import PHASES, Contender, OrtContender, Work, compared, measured
from spinpass import evaluation
from spinpass.cli.screen import Screen
from spinpass.config import RotationConfig
from spinpass.evaluation import SHIPPED_TEXT, ProgramScorer, needs_text, read_text, token_ids
from spinpass.folders import Result, onnx_tools, packaged_model, quantized, rotated, write_folder
from spinpass.formats import drafted
from spinpass.loading import LoadedModel, load_model
from spinpass.progress import Steps
from spinpass.runtime import OrtDecoder

GGUF, LLAMA = "llama.cpp, {}", "llama.cpp, Q4_0"
ALL = LLAMA + ", all logits"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
MISSING = (
    "{} has no llama-cpp-python ({}): python -m venv ENV && ENV/bin/pip install llama-cpp-python, "
    "then name ENV/bin/python"
)


def main(
    gguf: Annotated[Path | None, typer.Option(help="The model; the demo's if none is named.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to score on; else Python's help texts.")] = None,
    python: Annotated[str, typer.Option(help="Interpreter that has llama-cpp-python.")] = sys.executable,
    quantize: Annotated[str, typer.Option(help="A scheme beside --int4, for example w4g128-gptq-a8.")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Text for the scheme.")] = None,
    windows: Annotated[int, typer.Option(help="Windows that are scored.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    repeats: Annotated[int, typer.Option(help="Rounds of every timing.")] = 9,
    prompt: Annotated[int, typer.Option(help="Tokens of the timed prompt.")] = 256,
    new: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if quantize:
        calibration = calibration or (SHIPPED_TEXT if needs_text(quantize) else None)
    worker, screen = Worker(python), Screen(as_json=as_json)
    source = gguf or next(Path(packaged_model()).glob("*.gguf"))
    with screen.steps() as steps, TemporaryDirectory() as name:
        files = _gguf_files(source, Path(name), worker, steps)
        loaded = load_model(source, progress=steps.begin)
        assert loaded.companions is not None
        cut = evaluation.windows(token_ids(loaded.companions.tokenizer)(read_text(text)), length, windows)
        steps.start("score float32")
        reference = evaluation.perplexity(ProgramScorer(loaded.program), cut)
        folders = _folders(loaded, Path(name), quantize, calibration, steps)
        del loaded
        models = {n: Model(path, _losses(n, path, cut, worker, steps)) for n, path in (files | folders).items()}
        works = [Work(prompt, new, repeats, int(count)) for count in threads.split(",")]
        contenders: dict[str, Contender] = {n: LlamaContender(worker, path) for n, path in files.items()}
        contenders[ALL] = LlamaContender(worker, files[LLAMA], all_logits=True)
        contenders |= {n: OrtContender(folder) for n, folder in folders.items()}
        times = [measured(contenders, work, steps.start(f"time, {work.threads} threads")) for work in works]
        rows = {n: model.to_dict(reference) for n, model in models.items()}
    speeds = [{n: compared(each, found[LLAMA]) for n, each in found.items()} for found in times]
    if as_json:
        timings = [work.to_dict() | {"models": speed} for work, speed in zip(works, speeds)]
        about = {"model": source.name, "llama.cpp": worker.about, "windows": windows, "length": length}
        screen.document(about | {"reference": reference.to_dict(), "models": rows, "speeds": timings})
    screen.show(_table(rows, reference, windows, length), *(_speed_table(s, w) for s, w in zip(speeds, works)))


class Worker:
    """A process of the other interpreter, which runs :mod:`benchmarks.llama_cpp_worker`."""

    def __init__(self, python: str) -> None:
        # isolated: beside the script lies a module of the package's name
        command = [python, "-I", str(WORKER)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise typer.BadParameter(f"{python} cannot be started: {error}", param_hint="--python") from error
        self.about: dict[str, str] = self._answer()
        if "error" in self.about:
            raise typer.BadParameter(MISSING.format(python, self.about["error"]), param_hint="--python")

    def ask(self, task: str, **arguments: Any) -> Any:
        """Run the task there; returns what it returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{WORKER.name} ended with exit code {self._process.wait()}; its message stands above")
        return json.loads(line)


@dataclass(frozen=True)
class LlamaContender:
    """A GGUF file in llama.cpp."""

    worker: Worker
    gguf: Path
    all_logits: bool = False

    def round(self, work: Work, ids: list[int]) -> dict[str, float]:
        """See :class:`benchmarks.timing.Contender`."""
        about = {"prompt": work.prompt, "threads": work.threads, "all_logits": self.all_logits}
        found: dict[str, float] = self.worker.ask("time", gguf=str(self.gguf), ids=ids, **about)
        return found


@dataclass(frozen=True)
class Model:
    """A GGUF file or an ONNX folder, and its losses."""

    path: Path
    perplexity: evaluation.Perplexity

    def to_dict(self, reference: evaluation.Perplexity) -> dict[str, Any]:
        """The JSON-able form; the ratio is to the reference's perplexity, its standard error paired over windows."""
        change = evaluation.change(reference, self.perplexity)
        ratio = 1 + change.percent / 100
        files = self.path.glob("*.onnx*") if self.path.is_dir() else [self.path]
        about = {"ratio": ratio, "ratio_error": ratio * change.error, "bytes": sum(f.stat().st_size for f in files)}
        return about | {"weights": _kinds(self.path) if self.path.is_file() else ""} | self.perplexity.to_dict()


def _gguf_files(source: Path, out: Path, worker: Worker, steps: Steps) -> dict[str, Path]:
    """Name the file by what most of its weights are, and have it rounded to Q4_0 beside it."""
    steps.start("round to Q4_0")
    own = LLAMA if (kind := _kinds(source).split(" ")[0]) == "Q4_0" else GGUF.format(kind)
    files = {own: source}
    if own != LLAMA:
        files[LLAMA] = Path(worker.ask("requantize", source=str(source), target=str(out / "q4_0.gguf"), kind="Q4_0"))
    return files


def _kinds(gguf: Path) -> str:
    """Count how many tensors are stored how, the most frequent first."""
    from gguf import GGUFReader

    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors)
    return ", ".join(f"{kind} ({count})" for kind, count in counts.most_common())


def _folders(loaded: LoadedModel, out: Path, scheme: str, calibration: Path | None, steps: Steps) -> dict[str, Path]:
    """Write what the command line writes with ``--int4`` and ``--quantize``."""
    turned = rotated(loaded.program, RotationConfig(), steps, certify=False)
    wanted: dict[str, tuple[Callable[[], Result], bool]] = {
        "spinpass, --int4 --rotations none": (lambda: Result(loaded.program), True),
        "spinpass, --int4": (lambda: turned, True),
    }
    if scheme:
        online = rotated(loaded.program, RotationConfig(form="online"), steps, certify=False)
        wanted[f"spinpass, --form online --quantize {scheme}"] = (
            lambda: quantized(online, loaded, scheme, calibration, steps),
            False,
        )
    found = {}
    for number, (name, (make, int4)) in enumerate(wanted.items()):
        folder = found[name] = out / f"folder{number}"
        with drafted(folder) as draft:
            write_folder(onnx_tools(), loaded, make(), draft, steps, int4=int4, certify=False)
    return found


def _losses(name: str, path: Path, cut: list[list[int]], worker: Worker, steps: Steps) -> evaluation.Perplexity:
    tick = steps.start(f"score {name}")
    if path.is_dir():
        return evaluation.perplexity(OrtDecoder(path, threads=1), cut, tick)
    return evaluation.Perplexity(
        tuple(worker.ask("losses", gguf=str(path), windows=cut, threads=1)), sum(len(ids) - 1 for ids in cut)
    )


def _table(rows: Mapping[str, Any], reference: evaluation.Perplexity, windows: int, length: int) -> Table:
    table = Table("", "MB", "perplexity", "÷ float32", "GGUF tensors", title="Quality and size", title_justify="left")
    table.caption_justify = "left"
    table.caption = f"{windows} windows of {length} tokens; float32 {reference.value:.3f}; ± one standard error, paired"
    for name, row in rows.items():
        ratio = f"{row['ratio']:.4f} ± {row['ratio_error']:.4f}"
        table.add_row(name, f"{row['bytes'] / 1e6:.0f}", f"{row['perplexity']:.3f}", ratio, row["weights"])
    return table


def _speed_table(rows: Mapping[str, Any], work: Work) -> Table:
    against = f"÷ {LLAMA}"
    table = Table("", "decode tokens/s", against, "prefill tokens/s", against, title_justify="left")
    table.title, table.caption, table.caption_justify = "Speed", work.about, "left"
    for name, row in rows.items():
        cells = []
        for phase, tokens in zip(PHASES, (1, work.prompt)):
            if phase not in row:
                cells += ["", ""]
                continue
            low, high = row[phase]["quartiles"]
            rate = f"{tokens / row[phase]['seconds']:.1f}"
            cells += [rate, f"{row[phase]['ratio']:.3f} ({low:.3f}–{high:.3f})"]
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    typer.run(main)

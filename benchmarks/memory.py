"""What a model that is larger costs: ``python -m benchmarks.memory --shapes 50m,350m,1b``.

    a checkpoint of random weights  ->  spinpass export, rotate-checkpoint  ->  peak memory, CPU time, by parameter

The checkpoint is of the Llama family, in bfloat16, and is written a tensor at a time, so that it may be larger than
the memory. Its tokens are words of a made-up tokenizer: what is measured is how much memory and time a run takes, and
not what the model says. Peak memory is the anonymous memory of the process, sampled, above what it has when all
packages are imported; pages of mapped files, which the system takes back when it needs them, do not count. Whether
ONNX Runtime and transformers compute the same is tried by the runs themselves, for larger files in processes of their
own, whose peak stands beside. What ``spinpass plan`` foresees of exports, at the rates that it measures, stands beside
what was measured, divided by it. ``copy`` is the yardstick of what only moves bytes: ``cp -r``, and one read of the
files, after another read that brings them into the memory's cache. ``--steps`` shows each run by step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import IO, Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.imports import ROOT
from spinpass import RotationConfig
from spinpass.cli.screen import Screen
from spinpass.folders import ExportRequest, Forecast, Known, Rates
from spinpass.formats import write_shards
from spinpass.graph import Handle, Rows

MEGABYTE = 1e6
_WORDS = [
    "what", "is", "the", "weather", "like", "a", "an", "if", "it", "in", "on", "and", "or", "not", "of", "to", "for",
]  # fmt: skip
_IMPORTS = (
    "import time, torch, transformers, transformers.exporters, onnx_ir, onnxscript, onnxruntime, spinpass.folders, "
    "spinpass.exporters.onnx, spinpass.cli.app; time.sleep(2)"
)
_SAMPLED = 0.02  # seconds


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000
    head_dim: int = 64
    tied: bool = True


SHAPES = {
    "50m": Shape(512, 8, 1536, 8, 4),
    "100m": Shape(768, 12, 2048, 12, 4),
    "350m": Shape(1024, 28, 2816, 16, 4),
    "1b": Shape(2048, 16, 8192, 32, 8, 128_256),
    "8b": Shape(4096, 32, 14336, 32, 8, 128_256, 128, tied=False),
    "8b4": Shape(4096, 4, 14336, 32, 8, 128_256, 128, tied=False),  # four layers of it, tables and all
    "8b1": Shape(4096, 1, 14336, 32, 8, 128_256, 128, tied=False),
}
_COPY = "copy"
COMMANDS = {
    "export --bits 16": ["export", "{model}", "{out}", "--bits", "16"],
    "export --bits 4 --recipe plain": ["export", "{model}", "{out}", "--bits", "4", "--recipe", "plain"],
    "export w4g128-gptq": [  # 8 windows of 512 tokens
        "export", "{model}", "{out}", "--quantize", "w4g128-gptq-a8-head8g64-embed8g64", "--samples", "8",
    ],
    "rotate-checkpoint": ["rotate-checkpoint", "{model}", "{out}"],
    "rotate-checkpoint w4g128-rtn": ["rotate-checkpoint", "{model}", "{out}", "--quantize", "w4g128-rtn"],
    "rotate-checkpoint compressed-tensors": [
        "rotate-checkpoint", "{model}", "{out}", "--layout", "compressed-tensors", "--quantize", "w4g128-rtn",
        "--rotations", "R1,R2,R3,R4", "--block-size", "64",
    ],
}
FORESEEN: dict[str, dict[str, Any]] = {
    "export --bits 16": {"bits": 16},
    "export --bits 4 --recipe plain": {"bits": 4, "recipe": "plain"},
    "export w4g128-gptq": {"quantize": "w4g128-gptq-a8-head8g64-embed8g64", "calibration_windows": 8},
}
"""The exports among :data:`COMMANDS`, as requests."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Random weights that are drawn when they are read: a source of :class:`spinpass.graph.Handle`."""

    shape: torch.Size
    seed: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def by_rows(self) -> bool:
        """They do."""
        return True

    def read(self, rows: Rows) -> torch.Tensor:
        """Return rows of the first axis, each drawn from its block's own seed."""
        assert isinstance(rows, slice)
        first, last, _ = rows.indices(self.shape[0])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        drawn = torch.randn(last - first, *self.shape[1:], generator=generator)
        return (1 + 0.1 * drawn if len(self.shape) == 1 else 0.02 * drawn).to(self.dtype)

    def exact(self, rows: Rows) -> torch.Tensor:
        """Return the same in float64."""
        return self.read(rows).double()


@dataclass(eq=False)
class Measured:
    """What a run took: bytes of its own, of the processes that it began, and of all at one time; CPU seconds of all."""

    peak_bytes: int = 0
    others_bytes: int = 0
    together_bytes: int = 0
    cpu_seconds: float = 0.0
    steps: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    """The process's own peak, that of the others, and CPU seconds by step."""

    def sampled(self, step: str, own: int, others: int, seconds: float) -> None:
        """Take a sample: bytes now, and the process's CPU seconds until now."""
        peak, beside, spent = self.steps.get(step, (0, 0, 0.0))
        self.steps[step] = max(peak, own), max(beside, others), spent + seconds - self.cpu_seconds
        self.peak_bytes, self.others_bytes = max(self.peak_bytes, own), max(self.others_bytes, others)
        self.together_bytes = max(self.together_bytes, own + others)
        self.cpu_seconds = seconds


def main(
    shapes: Annotated[str, typer.Option(help=f"Names of shapes, separated by commas: {', '.join(SHAPES)}.")] = (
        "50m,350m"
    ),
    commands: Annotated[str, typer.Option(help=f"Kinds of runs, separated by commas; {_COPY} is one.")] = (
        ",".join([*COMMANDS, _COPY])
    ),
    out: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path("out/memory"),
    by_step: Annotated[bool, typer.Option("--steps", help="Show each run's peak and CPU seconds by step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the checkpoints, run, and print."""
    screen, rows = Screen(as_json=as_json), []
    with screen.steps() as steps:
        steps.start("import")
        base = _sampled([sys.executable, "-c", _IMPORTS]).peak_bytes
        for name in shapes.split(","):
            steps.start(f"write {name}")
            folder = out / name
            parameters = checkpoint(SHAPES[name.strip()], folder)
            for kind in map(str.strip, commands.split(",")):
                steps.start(f"{name}, {kind}")
                with TemporaryDirectory(dir=out) as target:
                    if kind == _COPY:
                        found = _copied(folder, Path(target, "out"))
                    else:
                        words = [word.format(model=folder, out=Path(target, "out")) for word in COMMANDS[kind]]
                        found = _sampled([sys.executable, "-m", "spinpass", *words, "--json"])
                        found.peak_bytes = max(0, found.peak_bytes - base)
                        found.together_bytes = max(0, found.together_bytes - base)
                about = {"shape": name, "parameters": parameters, "run": kind, "peak_bytes": found.peak_bytes}
                about |= {"others_bytes": found.others_bytes, "together_bytes": found.together_bytes}
                about |= {"cpu_seconds": found.cpu_seconds}
                about |= {"bytes_per_parameter": found.peak_bytes / parameters}
                by_name = {step: (max(0, peak - base), *more) for step, (peak, *more) in found.steps.items()}
                rows.append(about | _foreseen(kind, folder) | {"steps": by_name})
                screen.note(f"{name}, {kind}: {rows[-1]}")
    if as_json:
        screen.document({"imports_bytes": base, "rows": rows})
        return
    columns = "parameters", "run", "peak MB", "bytes/parameter", "with others", "foreseen ÷", "CPU s", "foreseen ÷"
    table = Table("", *columns, "ns/parameter")
    for row in rows:
        per = f"{1e9 * row['cpu_seconds'] / row['parameters']:.0f}"
        size, count = f"{row['peak_bytes'] / MEGABYTE:.0f}", f"{row['parameters'] / 1e6:.0f} M"
        ratio, beside = f"{row['bytes_per_parameter']:.1f}", f"{row['together_bytes'] / MEGABYTE:.0f}"
        memory, seconds = (
            f"{row[foreseen] / row[measured]:.2f}" if row[foreseen] else ""
            for foreseen, measured in (("foreseen_bytes", "together_bytes"), ("foreseen_seconds", "cpu_seconds"))
        )
        spent = f"{row['cpu_seconds']:.0f}"
        table.add_row(row["shape"], count, row["run"], size, ratio, beside, memory, spent, seconds, per)
    screen.show(table)
    for row in rows if by_step else ():
        table = Table("step", "peak MB", "beside it", "CPU s", title=f"{row['shape']}, {row['run']}")
        for step, (peak, others, spent) in row["steps"].items():
            table.add_row(step, f"{peak / MEGABYTE:.0f}", f"{others / MEGABYTE:.0f}", f"{spent:.1f}")
        screen.show(table)


def _foreseen(kind: str, model: Path) -> dict[str, float | None]:
    """Return what an export is foreseen to take, memory above imports and time; None of what is no export."""
    if kind not in FORESEEN:
        return {"foreseen_bytes": None, "foreseen_seconds": None}
    request = ExportRequest(str(model), Path("out"), RotationConfig(), **FORESEEN[kind])
    work = Known.of(str(model), dequantize=False, trust_remote_code=False).workload(request)
    assert work is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forecast = Forecast.of(work, Rates.measured(work.files[0]))
    torch.set_num_threads(threads)
    most = max(forecast.memory_bytes, forecast.runtime_bytes)
    return {"foreseen_bytes": most, "foreseen_seconds": forecast.seconds}


def checkpoint(shape: Shape, folder: Path) -> int:
    """Write a folder of transformers with random weights, unless it is there; return how many parameters it has."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    drawn = {name: Handle(Drawn(torch.Size(size), k)) for k, (name, size) in enumerate(_sizes(shape).items())}
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_shards(folder, drawn)
        _tokenizer().save_pretrained(folder)
        config.save_pretrained(folder)
    return sum(handle.numel() for handle in drawn.values())


def _sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for k in range(shape.layers):
        layer = {
            "self_attn.q_proj": (wide, shape.hidden), "self_attn.k_proj": (narrow, shape.hidden),
            "self_attn.v_proj": (narrow, shape.hidden), "self_attn.o_proj": (shape.hidden, wide),
            "mlp.gate_proj": (shape.intermediate, shape.hidden), "mlp.up_proj": (shape.intermediate, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.intermediate),
            "input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,),
        }  # fmt: skip
        found |= {f"model.layers.{k}.{part}.weight": size for part, size in layer.items()}
    head = {} if shape.tied else {"lm_head.weight": (shape.vocabulary, shape.hidden)}
    return found | {"model.norm.weight": (shape.hidden,)} | head


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *_WORDS, *(f"w{i}" for i in range(180))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def _copied(folder: Path, target: Path) -> Measured:
    """Copy a folder whose files are in the memory's cache, and read them once."""
    files = [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)  # into the cache
    copied, read = _sampled(["cp", "-r", str(folder), str(target)]), _sampled(["cat", *files])
    return Measured(max(copied.peak_bytes, read.peak_bytes), 0, copied.cpu_seconds + read.cpu_seconds)


def _sampled(command: list[str]) -> Measured:
    """Run a process; return the largest anonymous memory that it had, by step where it tells steps, and CPU seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found, said = Measured(), deque[str](maxlen=50)
    now = ""

    def step(name: str) -> None:
        nonlocal now
        now = name

    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stderr is not None
        reader = Thread(target=_follow, args=(started.stderr, said, step), daemon=True)
        reader.start()
        while os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            others = sum(map(_anonymous, _descendants(started.pid)))
            found.sampled(now, _anonymous(started.pid), others, _seconds(started.pid))
            time.sleep(_SAMPLED)
        _, code, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(code)
        reader.join()
    if code:
        raise SystemExit(f"{' '.join(command[2:5])} failed:\n{''.join(said)[-2000:]}")
    found.cpu_seconds = usage.ru_utime + usage.ru_stime
    return found


def _follow(lines: IO[str], said: deque[str], step: Callable[[str], None]) -> None:
    """Keep the last lines, and tell of the steps among the events."""
    for line in lines:
        said.append(line)
        if line.startswith('{"event": "step"'):
            step(json.loads(line)["name"])


def _anonymous(process: int) -> int:
    """Return the bytes that are a process's own now; none of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        if not Path("/proc/self/status").is_file():
            raise SystemExit("memory is read in /proc, which this system does not have") from error
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _seconds(process: int) -> float:
    """Return the CPU seconds of a process and of those that it has begun and that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _descendants(process: int) -> list[int]:
    """Return the processes that it, or one of them, has begun."""
    found = list[int]()
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            begun = [int(word) for word in path.read_text(encoding="utf-8").split()]
        except OSError:
            continue
        found += [each for child in begun for each in (child, *_descendants(child))]
    return found


if __name__ == "__main__":
    typer.run(main)

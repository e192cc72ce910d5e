"""What a model that is larger costs: ``python -m benchmarks.memory --shapes 50m,350m,1b``.

    a checkpoint of random weights  ->  spinpass export, rotate-checkpoint  ->  peak memory, CPU time, by parameter

The checkpoint is of the Llama family, in bfloat16, and is written a tensor at a time, so that it may be larger than
the memory. Its tokens are words of a made-up tokenizer: what is measured is how much memory and time a run takes, and
not what the model says. Peak memory is the anonymous memory of the process, sampled, above what it has when all
packages are imported; pages of mapped files, which the system takes back when it needs them, do not count. Whether
ONNX Runtime and transformers compute the same is tried by the runs themselves. What ``spinpass plan`` foresees of
exports, at the rates that it measures, stands beside what was measured, divided by it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

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


SHAPES = {
    "50m": Shape(512, 8, 1536, 8, 4),
    "100m": Shape(768, 12, 2048, 12, 4),
    "350m": Shape(1024, 28, 2816, 16, 4),
    "1b": Shape(2048, 16, 8192, 32, 8, 128_256),
}
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


def main(
    shapes: Annotated[str, typer.Option(help="Names of shapes, separated by commas.")] = "50m,350m",
    commands: Annotated[str, typer.Option(help="Kinds of runs, separated by commas.")] = ",".join(COMMANDS),
    out: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path("out/memory"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the checkpoints, run, and print."""
    screen, rows = Screen(as_json=as_json), []
    with screen.steps() as steps:
        steps.start("import")
        base = _sampled([sys.executable, "-c", _IMPORTS])["peak_bytes"]
        for name in shapes.split(","):
            steps.start(f"write {name}")
            folder = out / name
            parameters = checkpoint(SHAPES[name.strip()], folder)
            for kind in commands.split(","):
                steps.start(f"{name}, {kind}")
                with TemporaryDirectory(dir=out) as target:
                    words = [word.format(model=folder, out=Path(target, "out")) for word in COMMANDS[kind.strip()]]
                    found = _sampled([sys.executable, "-m", "spinpass", *words])
                peak = max(0.0, found["peak_bytes"] - base)
                about = {"shape": name, "parameters": parameters, "run": kind, "peak_bytes": peak}
                about |= {"bytes_per_parameter": peak / parameters, "cpu_seconds": found["cpu_seconds"]}
                rows.append(about | _foreseen(kind.strip(), folder))
                screen.note(f"{name}, {kind}: {rows[-1]}")
    if as_json:
        screen.document({"imports_bytes": base, "rows": rows})
        return
    columns = "parameters", "run", "peak MB", "foreseen ÷", "bytes/parameter", "CPU s", "foreseen ÷", "ns/parameter"
    table = Table("", *columns)
    for row in rows:
        per = f"{1e9 * row['cpu_seconds'] / row['parameters']:.0f}"
        size, count = f"{row['peak_bytes'] / MEGABYTE:.0f}", f"{row['parameters'] / 1e6:.0f} M"
        ratio = f"{row['bytes_per_parameter']:.1f}"
        memory, seconds = (
            f"{row[foreseen] / row[measured]:.2f}" if row[foreseen] else ""
            for foreseen, measured in (("foreseen_bytes", "peak_bytes"), ("foreseen_seconds", "cpu_seconds"))
        )
        spent = f"{row['cpu_seconds']:.0f}"
        table.add_row(row["shape"], count, row["run"], size, memory, ratio, spent, seconds, per)
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
    return {"foreseen_bytes": forecast.memory_bytes, "foreseen_seconds": forecast.seconds}


def checkpoint(shape: Shape, folder: Path) -> int:
    """Write a folder of transformers with random weights, unless it is there; return how many parameters it has."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=True, max_position_embeddings=4096,
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
    return found | {"model.norm.weight": (shape.hidden,)}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *_WORDS, *(f"w{i}" for i in range(180))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def _sampled(command: list[str]) -> dict[str, float]:
    """Run a process; return the largest anonymous memory that it had, and its CPU seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with TemporaryFile("w+", encoding="utf-8") as said:  # a pipe that nobody reads would fill
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        peak = 0
        while os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak = max(peak, _anonymous(started.pid))
            time.sleep(_SAMPLED)
        _, code, usage = os.wait4(started.pid, 0)
        if code:
            said.seek(0)
            raise SystemExit(f"{' '.join(command[2:5])} failed:\n{said.read()[-2000:]}")
    return {"peak_bytes": peak, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def _anonymous(process: int) -> int:
    """Return the bytes that are a process's own now."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit("memory is read in /proc, which this system does not have") from error
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    typer.run(main)

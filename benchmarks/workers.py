"""What several workers save: ``python -m benchmarks.workers --shape 50m --workers 2``.

    a checkpoint of random weights  ->  spinpass export by 1 process and by N  ->  the largest CPU seconds of a rank

Each process has one thread. CPU time is what a rank has worked, without what it has waited for others on a machine with
fewer cores than ranks; processes that it has started (ONNX Runtime's trials) are listed beside. How many bytes of
integers differ from those of one worker says what summing in another order has done.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import typer
from rich.table import Table

from benchmarks.imports import ROOT
from benchmarks.memory import COMMANDS, SHAPES, checkpoint
from spinpass.cli.screen import Screen

_RANK = """
import json, resource, sys
from spinpass.cli import main
try:
    main(sys.argv[2:])
finally:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    with open(sys.argv[1], "w") as file:
        json.dump([each.ru_utime + each.ru_stime for each in used], file)
"""
_INTEGERS = (ir.DataType.UINT8, ir.DataType.INT8)


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "50m",
    workers: Annotated[int, typer.Option(help="How many processes are compared with one.")] = 2,
    command: Annotated[str, typer.Option(help=f"One of {', '.join(COMMANDS)}.")] = "export w4g128-gptq",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave out what rank 0 proves alone.")] = False,
    out: Annotated[Path, typer.Option(help="Where the checkpoint is kept.")] = Path("out/memory"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the checkpoint, export it by one process and by several, and print."""
    screen = Screen(as_json=as_json)
    with screen.steps() as steps, TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as place:
        steps.start(f"write {shape}")
        model = out / shape
        checkpoint(SHAPES[shape], model)
        made, runs = [Path(place, "1"), Path(place, str(workers))], []
        for count, target in zip((1, workers), made, strict=True):
            steps.start(f"{count} at work")
            words = [word.format(model=model, out=target) for word in COMMANDS[command]]
            runs.append(_ranks(count, [*words, *(["--no-verify"] if no_verify else [])], Path(place)))
        differing, total = _differing(*made)
    own = [[rank[0] for rank in ranks] for ranks in runs]
    ratio = max(own[1]) / max(own[0])
    if as_json:
        about = {"shape": shape, "command": command, "workers": workers, "ratio": ratio}
        screen.document(about | {"cpu_seconds": runs, "bytes_differing": differing, "bytes": total})
        return
    table = Table("workers", "CPU s of each rank", "of what it started")
    for ranks in runs:
        table.add_row(str(len(ranks)), *(" ".join(f"{rank[k]:.1f}" for rank in ranks) for k in (0, 1)))
    said = f"{differing:,} of {total:,} bytes of integers differ from those of one worker"
    screen.show(table, f"{workers} workers ÷ 1, largest CPU seconds of a rank: {ratio:.2f}", said)


def _ranks(count: int, words: list[str], place: Path) -> list[list[float]]:
    """Run a command by so many processes; return the CPU seconds of each, and of the processes that it has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(count)}
    alike |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    files = [place / f"rank-{rank}-of-{count}.json" for rank in range(count)]
    started = []
    for rank, file in enumerate(files):
        command = [sys.executable, "-c", _RANK, str(file), *words]
        environment = os.environ | alike | {"RANK": str(rank)}
        with file.with_suffix(".txt").open("w", encoding="utf-8") as said:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said))
    for process, file in zip(started, files, strict=True):
        if process.wait():
            raise SystemExit(f"{' '.join(words[:3])} failed:\n{file.with_suffix('.txt').read_text()[-2000:]}")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _differing(first: Path, second: Path) -> tuple[int, int]:
    """Return how many bytes of integers differ in two exports, and how many there are."""
    found = [_integers(folder) for folder in (first, second)]
    if found[0].keys() != found[1].keys():
        raise SystemExit("the files hold other integers")
    pairs = [(found[0][name], found[1][name]) for name in found[0]]
    return sum(int(np.count_nonzero(a != b)) for a, b in pairs), sum(a.size for a, _ in pairs)


def _integers(folder: Path) -> dict[str, Any]:
    stored = {name: value.const_value for name, value in ir.load(folder / "model.onnx").graph.initializers.items()}
    return {name: held.numpy() for name, held in stored.items() if held is not None and held.dtype in _INTEGERS}


if __name__ == "__main__":
    typer.run(main)

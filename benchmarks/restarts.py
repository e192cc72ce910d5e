"""Whether a killed export is finished by the same command: ``python -m benchmarks.restarts --shape 50m --kills 20``.

    an export that is left alone  ->  its files;  the same, killed with SIGKILL at a random moment, and begun again

The moments are drawn evenly over the time that the unbroken run took. Each killed run has a folder of its own; what the
second run leaves is compared with the unbroken one's, byte for byte, and nothing may lie beside it. ``spinpass.json``
and ``README.md`` say how long something took, and are compared without that.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.imports import ROOT
from benchmarks.memory import COMMANDS, SHAPES, Shape, checkpoint
from spinpass.cli.screen import Screen
from spinpass.formats import KeptWork

_RUN = "export w4g128-gptq"
_SHAPES = SHAPES | {"tiny": Shape(128, 2, 256, 2, 1, 512)}
_TIMED = frozenset({"seconds", "decode", "prefill"})
_TOLD = "tokens/s"  # in a line of README.md


@dataclass(frozen=True)
class Kill:
    """A run that was killed so many ``seconds`` after it began, when ``rounded`` weights were kept, and what came of
    the run after it."""

    seconds: float
    rounded: int
    resumed_seconds: float
    differing: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the files are those of the unbroken run, and nothing else was left."""
        return not self.differing and not self.left


def main(
    shape: Annotated[str, typer.Option(help=f"Name of a shape: {', '.join(_SHAPES)}.")] = "50m",
    kills: Annotated[int, typer.Option(help="How many runs are killed.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path("out/memory"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Export, kill, export again, and compare."""
    screen, found = Screen(as_json=as_json), list[Kill]()
    drawn = random.Random(seed)
    with screen.steps() as steps, TemporaryDirectory(dir=_made(out)) as place:
        steps.start(f"write {shape}")
        model = out / shape
        checkpoint(_SHAPES[shape], model)
        steps.start("the unbroken run")
        unbroken = Path(place, "unbroken", "out")
        whole = _exported(model, unbroken)
        expected = contents(unbroken)
        progress = steps.start("killed runs")
        while len(found) < kills:
            folder = Path(place, str(len(found)), "out")
            kill = _killed(model, folder, drawn.uniform(0, whole), expected)
            if kill is not None:  # else the run was done before its moment came: another
                found.append(kill)
                screen.note(f"{len(found):3}  {_line(kill)}")
                progress(len(found), kills)
            shutil.rmtree(folder.parent)
    same = sum(kill.same for kill in found)
    if as_json:
        screen.document({"shape": shape, "unbroken_seconds": whole, "same": same, "kills": [asdict(k) for k in found]})
    table = Table("killed after s", "weights kept", "second run s", "result", title=f"{shape}: {same} of {kills}")
    for kill in found:
        row = f"{kill.seconds:.1f}", str(kill.rounded), f"{kill.resumed_seconds:.1f}"
        table.add_row(*row, "the same bytes" if kill.same else ", ".join((*kill.differing, *kill.left)))
    screen.show(table)
    if same < kills:
        raise typer.Exit(1)


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of each file of an exported folder, of what two runs must have alike."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "spinpass.json":
            content = json.dumps(_untimed(json.loads(content))).encode()
        elif path.name == "README.md":
            content = b"".join(line for line in content.splitlines(keepends=True) if _TOLD.encode() not in line)
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def _untimed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without times, and without hashes of what holds them: its own and that of README.md."""
    files = {name: about for name, about in manifest["files"].items() if name != "README.md"}
    parts = {"onnx", "card"} & manifest.keys()
    timed = {part: {k: v for k, v in (manifest[part] or {}).items() if k not in _TIMED} for part in parts}
    return {name: value for name, value in manifest.items() if name != "sha256"} | timed | {"files": files}


def _killed(model: Path, out: Path, moment: float, expected: dict[str, str]) -> Kill | None:
    """Kill an export at a moment, in seconds, and finish it; None where it was done by then."""
    out.parent.mkdir()
    with TemporaryFile() as said:
        running = _started(model, out, said)
        try:
            running.wait(moment)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        else:
            if running.returncode:
                raise SystemExit(f"the export failed by itself:\n{_said(said)}")
            return None
    rounded = KeptWork(out.parent / f".{out.name}.spinpass" / "work").count
    seconds = _exported(model, out)
    made = contents(out)
    differing = sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name))
    left = sorted(name for name in os.listdir(out.parent) if name != out.name)
    return Kill(moment, rounded, seconds, tuple(differing), tuple(left))


def _exported(model: Path, out: Path) -> float:
    """Export, and return how many seconds that took."""
    out.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    with TemporaryFile() as said:
        if _started(model, out, said).wait():
            raise SystemExit(f"the export failed:\n{_said(said)}")
    return time.perf_counter() - began


def _started(model: Path, out: Path, said: Any) -> subprocess.Popen[bytes]:
    words = [word.format(model=model.resolve(), out=out.resolve()) for word in COMMANDS[_RUN]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "spinpass", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)


def _said(said: Any) -> str:
    said.seek(0)
    return str(said.read()[-2000:].decode(errors="replace"))


def _line(kill: Kill) -> str:
    how = "the same bytes" if kill.same else f"differs: {', '.join((*kill.differing, *kill.left))}"
    killed = f"killed after {kill.seconds:.1f} s with {kill.rounded} weights"
    return f"{killed}, finished in {kill.resumed_seconds:.1f} s: {how}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    typer.run(main)

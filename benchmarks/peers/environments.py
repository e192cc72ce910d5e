"""Where the tools live: an environment for each, of pinned packages, built when it is first asked for.

``--env NAME=PYTHON`` names the interpreter of one that is there already. Everything runs on one thread and without a
network; what a tool prints goes into a log beside what it makes, and the last of it says why it failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.imports import ROOT

# The first package of each is the tool; those after it are what it leaves to its users to choose, or forgets to name.
PACKAGES: Mapping[str, Sequence[str]] = {
    "genai": (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "torch==2.13.0",
        "transformers==5.23.0",
        "sentencepiece==0.2.3",
    ),
    "olive": (
        "olive-ai==0.13.0",
        "onnxruntime==1.31.1",
        "torch==2.13.0",
        "transformers==5.24.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "requests==2.34.2",
    ),
    "autoround": ("auto-round==0.16.1", "torch==2.13.0", "transformers==5.24.0", "gguf==0.19.0"),
    "llama": ("llama-cpp-python==0.3.36",),
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_RAISED = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt)\b.*")
_LONGEST = 200  # characters of an error in the table
_ASK = "import json, sys; from importlib import metadata as m; print(json.dumps([m.version(n) for n in sys.argv[1:]]))"


class PeerError(Exception):
    """A tool did not do what it was asked for; the message is what it said last."""


@dataclass(frozen=True)
class Cost:
    """What a command took, its own children included."""

    cpu_minutes: float
    peak_bytes: int

    def __add__(self, after: Cost) -> Cost:
        """That of one command after the other."""
        return Cost(self.cpu_minutes + after.cpu_minutes, max(self.peak_bytes, after.peak_bytes))


@dataclass(frozen=True)
class Environments:
    """The interpreters of the tools.

    Args:
        folder: where environments are built.
        named: interpreters that are there already, by the name of their environment.
    """

    folder: Path
    named: Mapping[str, str]

    def python(self, name: str) -> str:
        """The interpreter of an environment, which is built if need be. Raises PeerError where it cannot be."""
        if name in self.named:
            return self.named[name]
        home = self.folder / name
        done, python = home / "installed.json", home / "bin" / "python"
        wanted = json.dumps(PACKAGES[name])
        if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
            log = self.folder / f"{name}.log"
            run([sys.executable, "-m", "venv", "--clear", str(home)], log)
            run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES[name]], log)
            done.write_text(wanted, encoding="utf-8")
        return str(python.absolute())

    def versions(self, name: str) -> dict[str, str]:
        """The packages of an environment that are named here, in the version that is installed."""
        if name not in PACKAGES:
            raise PeerError(f"there is no tool {name!r}: {', '.join(PACKAGES)} are known")
        packages = [package.split("==")[0] for package in PACKAGES[name]]
        asked = subprocess.run([self.python(name), "-c", _ASK, *packages], capture_output=True, text=True, check=False)
        if asked.returncode:
            raise PeerError(f"{self.python(name)}: {last_words(asked.stderr)}")
        return dict(zip(packages, json.loads(asked.stdout), strict=True))


def run(command: Sequence[str], log: Path) -> Cost:
    """Run a command on one thread and keep what it prints. Raises PeerError with the last of it where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = os.environ | _OFFLINE | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as opened:
        try:
            started = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=opened, stderr=subprocess.STDOUT)
        except OSError as error:
            raise PeerError(f"{command[0]} cannot be started: {error.strerror}") from error
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if status:
        said = last_words(log.read_text(encoding="utf-8", errors="replace"))
        if started.returncode < 0:
            said = f"ended by {signal.Signals(-started.returncode).name}, having said: {said or 'nothing'}"
        raise PeerError(said or f"exit code {started.returncode}, and nothing was said")
    return Cost((usage.ru_utime + usage.ru_stime) / 60, usage.ru_maxrss * 1024)


def last_words(text: str) -> str:
    """What a log says of a failure: the last exception that it names, else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    found = (raised or lines or [""])[-1]
    return found if len(found) <= _LONGEST else found[: _LONGEST - 1] + "…"

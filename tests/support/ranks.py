"""Processes that are the ranks of one team, as torchrun starts them: each with a folder of its own for temporary files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.imports import ROOT

Ended = subprocess.CompletedProcess[str]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()} | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a rank that ends first leaves a warning with the others, or not
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run(
    place: Path,
    *commands: list[Any],
    seconds: float = 300,
    size: int | None = None,
    port: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Run one command as each rank, and return what became of them. ``size``: of a team of which more are said to be."""
    port, started = port or free_port(), []
    for rank, command in enumerate(commands):
        (place / f"tmp-{rank}").mkdir(exist_ok=True)
        env = os.environ | environment(rank, size or len(commands), port) | dict(extra or {})
        env["TMPDIR"] = str(place / f"tmp-{rank}")
        words = [str(word) for word in command]
        started.append(
            subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place)
        )
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(p.args, p.returncode, *each) for p, each in zip(started, said, strict=True)]


def run_script(place: Path, script: str, *arguments: object, size: int = 2, seconds: float = 300) -> list[Ended]:
    """Run one Python text as each rank."""
    return run(place, *([sys.executable, "-c", script, *arguments] for _ in range(size)), seconds=seconds)

"""What this machine can do: how fast it is, measured in some seconds, and how much memory there is for a run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from spinpass.graph import HOST
from spinpass.rotations import Rotation

_SECONDS = 0.2  # of each measurement, at least
_GEMM, _CHOLESKY, _WIDTH = 512, 768, 4096  # milliseconds each, shorter than another process's turn
_BLOCK = 1 << 22  # bytes that are copied, hashed and read at once
_READ = 1 << 27  # bytes of a file that are read
_CALLS = 500
IMPORTED = 250 << 20
"""Bytes of the process when all packages are imported."""


@dataclass(frozen=True)
class Rates:
    """How much of each kind of work is done in a second, by as many threads as torch has.

    Attributes:
        gemm64, gemm32: floating-point operations of large products, in float64 and float32.
        cholesky: those of a factorization in float64, n³/3 for a matrix (n, n).
        copy: bytes that are copied in memory.
        read: bytes that are read from a file; where the system has kept it in memory, as fast as that is.
        hash: bytes of which the SHA-256 is computed.
        fold: weights that a rotation is folded into, float32 in and out.
        calls: operators called on tensors of no size: what Python and torch take for themselves.
    """

    gemm64: float
    gemm32: float
    cholesky: float
    copy: float
    read: float
    hash: float
    fold: float
    calls: float

    @classmethod
    def measured(cls, file: Path | None = None) -> Rates:
        """Measure for about two seconds; reading on ``file``, at the rate of copying where there is none."""
        with torch.no_grad():
            copied = (
                torch.empty(_BLOCK, dtype=torch.uint8, device=HOST),
                torch.ones(_BLOCK, dtype=torch.uint8, device=HOST),
            )
            copy = _BLOCK * _rate(lambda: copied[0].copy_(copied[1]))
            rotation = Rotation.create("hadamard", _WIDTH)
            weight = torch.randn(64, _WIDTH, device=HOST)
            spd = torch.eye(_CHOLESKY, dtype=torch.float64, device=HOST) + 0.5 / _CHOLESKY
            small = torch.zeros(1, device=HOST)
            content = bytes(_BLOCK)
            return cls(
                gemm64=_product(torch.float64),
                gemm32=_product(torch.float32),
                cholesky=_CHOLESKY**3 / 3 * _rate(lambda: torch.linalg.cholesky_ex(spd)),
                copy=copy,
                read=copy if file is None else _read(file),
                hash=_BLOCK * _rate(lambda: hashlib.sha256(content).digest()),
                fold=weight.numel() * _rate(lambda: rotation.apply(weight.double(), 1).float()),
                calls=_CALLS * _rate(lambda: [small.add(1) for _ in range(_CALLS)]),
            )

    def to_dict(self) -> dict[str, float]:
        """Return them by name, a second's worth each."""
        return dict(vars(self))


def free_memory() -> int:
    """Return how many bytes a process may still take: of the machine, and of the control groups that it is in.

    Where nothing says so (no /proc), it is all that there could be.
    """
    return min(_available(), *_left_in_groups(), 1 << 62)


def said(count: float) -> str:
    """Return a number of bytes of memory as a message has it."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def own_memory() -> int:
    """Return the bytes that are this process's own now; 0 where nothing says so."""
    return _of_lines(Path("/proc/self/status"), "RssAnon:", 0)


def _available() -> int:
    return _of_lines(Path("/proc/meminfo"), "MemAvailable:", 1 << 62)


def _of_lines(file: Path, name: str, otherwise: int) -> int:
    """Return the entry of a file of lines ``name: so many kB``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return otherwise
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), otherwise)


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield what each control group above this process leaves, of both versions; pages of files do not count."""
    try:
        lines = process.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base = root / "memory" if kinds else root / "unified" if (root / "unified").is_dir() else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if base == group or base in group.parents:
                limit, used = (_number(group / name) for name in names)
                if limit is not None and used is not None:
                    yield max(0, limit - used + _file_pages(group / "memory.stat"))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def _file_pages(stat: Path) -> int:
    """Return the bytes that a group holds of files, and of what is known of them, and that the system takes back."""
    try:
        entries = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    names = (
        ("total_inactive_file", "total_active_file")
        if "total_cache" in entries
        else ("inactive_file", "active_file", "slab_reclaimable")
    )
    return sum(int(entries.get(name, 0)) for name in names)


def _product(dtype: torch.dtype) -> float:
    a, b = (torch.ones(_GEMM, _GEMM, dtype=dtype, device=HOST) for _ in range(2))
    return 2 * _GEMM**3 * _rate(lambda: a @ b)


def _rate(work: Callable[[], object]) -> float:
    """Return how often work is done in a second, at best: what else runs here takes from some of the calls.

    Of one thread the time is its own, without that of others.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    began, best = time.perf_counter(), 0.0
    while time.perf_counter() - began < _SECONDS:
        start = clock()
        work()
        best = max(best, 1 / max(clock() - start, 1e-9))
    return best


def _read(file: Path) -> float:
    """Return how many bytes a second are read from the start of a file."""
    began, size = time.perf_counter(), 0
    with file.open("rb", buffering=0) as stream:
        while size < _READ and (chunk := stream.read(_BLOCK)):
            size += len(chunk)
    return max(1, size) / max(time.perf_counter() - began, 1e-9)

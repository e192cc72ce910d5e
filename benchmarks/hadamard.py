"""Time of ``hadamard_transform`` beside one dense product with the same matrix: ``python benchmarks/hadamard.py``.

Medians of repeated calls on one thread. The ratio is dense / structured: above 1 the structure pays.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spinpass.rotations import hadamard

SIZES = (64, 576, 1536, 4096, 11008, 14336)
TOKENS = (1, 128)


@dataclass(frozen=True)
class Row:
    """Medians in microseconds; ``ratio`` is dense over structured."""

    size: int
    factors: tuple[int, ...]
    tokens: int
    structured_us: float
    dense_us: float
    ratio: float


def median_us(call: Callable[[], object], seconds: float) -> float:
    """Take the median time of one call, from at least 5 and as many as fit into ``seconds``."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(size: int, tokens: int, dtype: torch.dtype, seconds: float) -> Row:
    """Time both products on the same random input of shape (tokens, size)."""
    x = torch.randn(tokens, size, dtype=dtype)
    dense = hadamard.matrix(size, dtype) / size**0.5
    structured_us = median_us(lambda: hadamard.hadamard_transform(x, size), seconds)
    dense_us = median_us(lambda: x @ dense, seconds)
    return Row(size, hadamard.kronecker_factors(size), tokens, structured_us, dense_us, dense_us / structured_us)


def render(rows: list[Row]) -> Table:
    """A table with one line per size and token count."""
    table = Table(
        "n", "factors", "tokens", "structured µs", "dense µs", "dense / structured", title="Hadamard transform"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        factors = " × ".join(map(str, row.factors))
        times = (f"{row.structured_us:,.0f}", f"{row.dense_us:,.0f}", f"{row.ratio:.1f}")
        table.add_row(str(row.size), factors, str(row.tokens), *times)
    return table


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seconds: Annotated[float, typer.Option(help="Time spent on each median.")] = 0.2,
    double: Annotated[bool, typer.Option("--float64", help="Measure float64 instead of float32.")] = False,
) -> None:
    """Compare the structured transform with a dense product."""
    torch.set_num_threads(1)
    dtype = torch.float64 if double else torch.float32
    cases = [(size, tokens) for size in SIZES for tokens in TOKENS]
    progress = track(cases, "measuring", console=Console(stderr=True), transient=True)
    rows = [measure(size, tokens, dtype, seconds) for size, tokens in progress]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console().print(render(rows))


if __name__ == "__main__":
    typer.run(main)

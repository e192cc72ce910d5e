"""Time of ``hadamard_transform`` beside one dense product with the same matrix: ``python benchmarks/hadamard.py``.

Medians of repeated calls on one thread. The ratio is dense / structured: above 1 the structure pays. A second table has
the fold of one large weight, float64 arithmetic and one rounding, beside a copy of it into memory of its own, which is
what a fold returns, and beside a copy into memory that is there, the least that touching every value can take.
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

from spinpass.graph import QueuedStep, folded
from spinpass.rotations import Rotation, hadamard

FOLDED = (14336, 4096)
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


@dataclass(frozen=True)
class Fold:
    """Medians of one fold, of a copy into new memory and of one into memory that is there, in milliseconds."""

    axes: str
    fold_ms: float
    clone_ms: float
    copy_ms: float


def measure_folds(seconds: float) -> list[Fold]:
    """Time folds of a float32 weight: along its rows, along its columns, with a norm's scale, and on both sides."""
    weight = torch.randn(FOLDED)
    there = torch.empty_like(weight)
    columns, rows = (Rotation.create("hadamard", size) for size in reversed(FOLDED))
    scale = torch.rand(FOLDED[1], dtype=torch.float64)
    scaled = QueuedStep(lambda x: x * scale, "scale", frozenset())
    right = QueuedStep(lambda x: columns.apply(x, 1), "right", frozenset({1}))
    left = QueuedStep(lambda x: rows.apply(x, 0), "left", frozenset({0}))
    clone_ms, copy_ms = (median_us(f, seconds) / 1e3 for f in (weight.clone, lambda: there.copy_(weight)))
    kinds = {"x R": [right], "x diag(g) R": [scaled, right], "Rᵀ x": [left], "Rᵀ x R": [left, right]}
    return [
        Fold(name, median_us(lambda: folded(weight, steps), seconds) / 1e3, clone_ms, copy_ms)  # noqa: B023
        for name, steps in kinds.items()
    ]


def render_folds(rows: list[Fold]) -> Table:
    """A table with one line per kind of fold."""
    size = "×".join(map(str, FOLDED))
    table = Table("fold", "ms", "÷ clone", "÷ copy", title=f"Fold of a float32 weight of {size}")
    for row in rows:
        ratios = (row.fold_ms / row.clone_ms, row.fold_ms / row.copy_ms)
        table.add_row(row.axes, f"{row.fold_ms:.0f}", *(f"{ratio:.1f}" for ratio in ratios))
    return table


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
    folds = measure_folds(seconds)
    if as_json:
        found = {"products": [asdict(row) for row in rows], "folds": [asdict(row) for row in folds]}
        print(json.dumps(found, indent=2))
    else:
        Console().print(render(rows), render_folds(folds))


if __name__ == "__main__":
    typer.run(main)

"""Matrices drawn from what a program admits, and how exact it is with them; see ``benchmarks/exactness.py``.

Every space gets a matrix of the largest group that its plan names: orthogonal, invertible, one for each head, scales or
an order of channels. Singular values are between about a third and three, so that rounding is felt little.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Generator, Tensor
from torch.export import ExportedProgram

import spinpass
from spinpass import Rotation, RotationConfig
from spinpass.config import Form
from spinpass.errors import SpinpassError
from spinpass.planning import PlannedSpace
from spinpass.rotations import hadamard

from .zoo.models import model_types

LIMIT = 1e-9
_ROLES = "R1,R2,R3,R4,latent,gates"
_SPREAD = 0.3
_GATE = re.compile(r"it takes (a scale for each channel|an order)")
_SIZE = re.compile(r"space has size (\d+)")


def types_of(path: Path, sample: int) -> list[str]:
    """Return so many types of transformers, evenly out of those that a file names."""
    named = set(re.findall(r"[\w-]+", path.read_text(encoding="utf-8")))
    names = [each for each in model_types(switches=False) if each in named]
    step = max(1, len(names) // sample)
    return names[::step][:sample]


def measured(name: str, program: ExportedProgram, form: Form) -> dict[str, Any]:
    """Transform a program by random matrices of what it admits; return a row with the error in float64."""
    plain = RotationConfig(rotations=_ROLES, form=form, verify=False)  # type: ignore[arg-type]
    matrices = drawn(program, plain)
    row: dict[str, Any] = {"model": name, "form": form, "matrices": len(matrices), "kinds": _kinds(matrices)}
    if not matrices:
        return row | {"error": 0.0, "ok": True}
    asked = RotationConfig(rotations=_ROLES, form=form, matrices=matrices)  # type: ignore[arg-type]
    try:
        found = spinpass.rotate(program, asked)
    except SpinpassError as error:
        return row | {"error": None, "ok": False, "why": str(error)}
    assert found.certificate is not None
    error = max(output.float64.relative for output in found.certificate.outputs)
    return row | {"error": error, "ok": found.certificate.ok and error < LIMIT}


def drawn(program: ExportedProgram, config: RotationConfig) -> dict[str, Rotation]:
    """Return a random matrix for every space of a program, and for every gate, of what it admits."""
    plan = spinpass.plan(program, config)
    found = {space.name: _matrix(space) for space in plan.spaces}
    for refusal in plan.refusals:
        told = _GATE.match(refusal.why)
        if told is not None:
            size = _size(program, refusal.what)
            generator = _generator(refusal.what)
            found[refusal.what] = (
                Rotation.from_permutation(torch.randperm(size, generator=generator))
                if told[1] == "an order"
                else Rotation.from_blocks(_normal(size, generator=generator).mul(_SPREAD).exp())
            )
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table, the worst first."""
    made = Table("model", "R1", "matrices", "relative error", title="Random matrices, float64", title_justify="left")
    for row in sorted(rows, key=lambda row: row["error"] if row["error"] is not None else 1.0, reverse=True):
        error = row.get("why", "") if row["error"] is None else f"{row['error']:.1e}"
        made.add_row(row["model"], row["form"], row["kinds"], error + ("" if row["ok"] else " FAIL"))
    return made


def _matrix(space: PlannedSpace) -> Rotation:
    generator = _generator(space.name)
    if space.heads > 1:
        blocks = [_dense(space.size, generator, space.group == "invertible") for _ in range(space.heads)]
        return Rotation.from_blocks(torch.stack(blocks))
    order = hadamard.largest_order(space.size)
    sizes = hadamard.kronecker_factors(order) if order == space.size else (space.size,)
    return Rotation.from_factors([_dense(size, generator, space.group == "invertible") for size in sizes])


def _dense(size: int, generator: Generator, invertible: bool) -> Tensor:
    turned: Tensor = torch.linalg.qr(_normal(size, size, generator=generator)).Q
    return turned * _normal(size, generator=generator).mul(_SPREAD).exp() if invertible else turned


def _normal(*size: int, generator: Generator) -> Tensor:
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def _generator(name: str) -> Generator:
    return Generator().manual_seed(zlib.crc32(name.encode()))


def _size(program: ExportedProgram, gate: str) -> int:
    """Return how many channels a gate has, which the refusal of an order of one says."""
    asked = RotationConfig(rotations="gates", matrices={gate: torch.zeros(1, dtype=torch.int64)})  # type: ignore[arg-type]
    try:
        return spinpass.plan(program, asked).spaces[0].size
    except SpinpassError as error:
        told = _SIZE.search(str(error))
        if told is None:
            raise
        return int(told[1])


def _kinds(matrices: dict[str, Rotation]) -> str:
    of: dict[str, int] = {}
    for name, each in matrices.items():
        kind = "orthogonal" if each.is_orthogonal and each.kind != "permutation" else each.kind
        kind = "scales" if each.kind == "blocks" and each.order == 1 else kind
        label = f"{name.split(':')[0]} {kind}"
        of[label] = of.get(label, 0) + 1
    return ", ".join(f"{label}×{count}" for label, count in of.items())

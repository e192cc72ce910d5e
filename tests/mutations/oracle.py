"""Is a rotated program the same function? Decided here by two runs, without the certificate."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

import spinpass
from spinpass import record
from spinpass.errors import RefusedError
from spinpass.execution.interpreter import execute, flat_inputs
from tests.support.decoders import relative_error

EXACT = 1e-9
ROLES = {"R1", "R2", "R3", "R4"}
STEPS = 2  # the second sees the buffers that the first has left


def steps(program: ExportedProgram, args: tuple[Any, ...]) -> list[list[Any]]:
    """Outputs and updated state of two runs lifted to float64, the second on the state of the first; caches in their original basis."""
    found = record.read(program)
    carried, restored = (found.inputs, found.outputs) if found else ({}, {})
    values = {n: turned(x, carried.get(n)) for n, x in flat_inputs(program, args).items()}
    state: dict[str, Tensor] = {}
    seen = []
    for _ in range(STEPS):
        torch.manual_seed(0)  # stochastic depth draws at run time
        result = execute(program, values | state, float64=True)
        state |= result.state  # what did not change is not among it
        outputs = [turned(x, restored.get(i), inverse=True) for i, x in enumerate(result.outputs)]
        seen.append(outputs + [turned(x, carried.get(n), inverse=True) for n, x in sorted(state.items())])
        if not state:
            break
    return seen


def turned(x: Any, carried: record.Carried | None, *, inverse: bool = False) -> Any:
    """A cache in the basis that the record names, or back in its original one."""
    if carried is None:
        return x
    last = x.to(torch.float64).movedim(carried.dim, -1)
    blocks = last.unflatten(-1, (-1, carried.rotation.size))
    return carried.rotation.apply(blocks, inverse=inverse).flatten(-2).movedim(-1, carried.dim)


def error(expected: list[list[Any]], actual: list[list[Any]]) -> float:
    """The largest relative error of any output of any step."""
    return max(relative_error(a, b) for a, b in zip(expected, actual, strict=True))


def check(
    source: ExportedProgram,
    expected: list[list[Any]],
    args: tuple[Any, ...],
    missing: set[str],
    *,
    bound: float = EXACT,
    **settings: Any,
) -> None:
    """Exact, with every rotation that is not in ``missing``; or refused for stated reasons where all may be missing."""
    config = spinpass.RotationConfig(verify=False, **settings)
    try:
        result = spinpass.transform(source, config)
    except RefusedError as refused:
        assert missing >= ROLES and re.search(r"R\d.*: \S", str(refused)), str(refused)
        return
    wrong = error(expected, steps(result, args))
    assert wrong <= bound, f"{settings}: relative error {wrong}\n{spinpass.plan(source, config)}"
    found = record.read(result)
    assert found is not None
    roles = {name.split(":")[0] for name in found.rotations}
    assert roles >= ROLES - missing, f"{settings}: no {ROLES - missing - roles}\n{spinpass.plan(source, config)}"


def reasons(plan: spinpass.RotationPlan) -> str:
    """All that a plan says about what it did not do, or does online."""
    return "\n".join(
        [
            *map(str, plan.refusals),
            *(n for s in plan.spaces for n in s.notes),
            *(p.why for s in plan.spaces for p in s.online),
        ]
    )

"""The certificate continued onto a .pte file: what ExecuTorch's runtime returns against the program, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass import execution
from spinpass.certificate import (
    BOUNDS,
    FileCertificate,
    FileOutput,
    as_tensor,
    compare_output,
    describe,
    narrowest_dtype,
    of_draws,
    on_draws,
    rounding_of,
    worst_of_runs,
)
from spinpass.execution import output_names
from spinpass.runtime import PteMethod

_FURTHER_STEPS = 2


@dataclass(frozen=True)
class PteCertificate(FileCertificate):
    """The certificate says how far a .pte file is from the program; ``steps`` is how often both were run in a
    draw, on the state that each kept."""

    kind: str = ".pte file"
    steps: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, as :meth:`FileCertificate.to_dict` does."""
        return super().to_dict() | {"steps": self.steps}


def certify_pte(ep: ExportedProgram, path: Path, inputs: object = None, bound: float | None = None) -> PteCertificate:
    """Run the file at ``path`` and ``ep`` on ``inputs`` and compare.

    Where the program keeps a cache in its buffers both are run on, each on the cache that it wrote itself.

    Args:
        ep: the program that the file was written from.
        path: a .pte file.
        inputs: as :func:`spinpass.execution.flat_inputs` takes them; None draws several from the program's own specs.
        bound: the largest relative error of an output; None is that of the program's dtype.

    Raises:
        ExportError: ExecuTorch cannot load or run the file.
        ConfigError: the inputs do not fit the program.
    """
    runs = on_draws(ep, inputs, lambda values: _run(ep, path, values, bound))
    return replace(of_draws([[run] for run in runs]), steps=max(run.steps for run in runs))


def _run(ep: ExportedProgram, path: Path, values: Mapping[str, Any], bound: float | None) -> PteCertificate:
    """Compare the two from ``values`` on."""
    described = tuple(f"{name} {describe(value)}" for name, value in values.items())
    dtype = narrowest_dtype(ep)
    limit = BOUNDS[dtype] if bound is None else bound
    method, state = PteMethod(path), dict[str, Any]()
    runs: dict[str, list[FileOutput]] = {}
    for step in range(1 + _FURTHER_STEPS):
        given = {**values, **state}
        expected = execution.execute(ep, given)
        found = method.run(list(values.values()))
        rounding = rounding_of(ep, given)
        compared = zip(output_names(ep), expected.outputs, found, strict=True)
        for i, (name, reference, result) in enumerate(compared):
            noise = partial(rounding.of_output, i)
            output = compare_output(name, as_tensor(reference), as_tensor(result), limit, noise)
            runs.setdefault(name, []).append(output)
        state |= expected.state
        following = _following(ep, values, state, step)
        if following is None:
            break
        values = following
    return PteCertificate(tuple(map(worst_of_runs, runs.values())), dtype, described, steps=step + 1)


def _following(
    ep: ExportedProgram, values: Mapping[str, Any], state: Mapping[str, Any], step: int
) -> dict[str, Any] | None:
    """Return the inputs of the next step; None where there is none."""
    if not state or state.keys() & values.keys():  # without state, or with state that the caller keeps
        return None
    following = execution.next_inputs(ep, values, state, seed=step + 1)
    return None if isinstance(following, str) else following

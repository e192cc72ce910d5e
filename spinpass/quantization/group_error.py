"""What rounding costs at each group of a layer's inputs:  ‖X_g (Ŵ_g − W_g)ᵀ‖² / ‖X Wᵀ‖²,  W_g its columns.

As :mod:`.site_error`, with the columns of a weight apart; what errors of different groups have in common is left out.
Inputs are taken as they are, since their rounding does not depend on the width of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..execution import constants
from ..passes.functionalize import open_program
from .config import WEIGHT_BITS, Weights
from .grid import rounded
from .lockstep import Watch, run_in_lockstep
from .moments import Moments
from .sites import WeightSite, weight_sites

_TINY = 1e-30


@dataclass(frozen=True)
class Layer:
    """What gets one width: ``size`` weights, and their error by bits."""

    size: int
    errors: Mapping[int, float]


def group_errors(
    program: ExportedProgram,
    how: Weights,
    names: Collection[str],
    inputs: Sequence[object],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Layer]]:
    """By name of a weight (out, in), its groups.

    Args:
        how: group size and grid; weights are rounded to nearest, whatever its method, at each of ``WEIGHT_BITS``.
        names: of weights of two axes.
        inputs: as for :func:`spinpass.quantization.quantize`; a few hundred tokens will do.

    Raises ConfigError where ``inputs`` do not fit the program.
    """
    editor = open_program(program)
    named = [(site, editor.fqn(site.weight)) for site in weight_sites(editor)[0] if editor.fqn(site.weight) in names]
    prepared = editor.finish()
    stored = constants(prepared)
    found: dict[str, list[Layer]] = {}

    def watch(site: WeightSite, fqn: str) -> Watch:
        def measure(values: list[Tensor], _: list[Tensor]) -> Mapping[str, Tensor]:
            if fqn not in found:
                matrix = stored[site.weight.name].detach().movedim(site.dim, -1).float()
                found[fqn] = _groups(matrix, Moments.of(values, values).own, how)
            return {}

        return measure

    watched = {site.linear.name: (site.operand.name, watch(site, fqn)) for site, fqn in named}
    if watched:
        run_in_lockstep(prepared, inputs, watched, progress=progress)
    return found


def _groups(matrix: Tensor, hessian: Tensor, how: Weights) -> list[Layer]:
    rows, columns = matrix.shape
    size = how.group_size or columns
    power = ((matrix.double() @ hessian) * matrix.double()).sum().clamp_min(_TINY)
    errors: list[dict[int, float]] = [{} for _ in range(0, columns, size)]
    for bits in WEIGHT_BITS:
        off = (rounded(matrix, replace(how, bits=bits, group_bits=None)).dequantized() - matrix).double()
        for k, part in enumerate(torch.split(off, size, 1)):
            at = slice(k * size, k * size + part.shape[1])
            errors[k][bits] = float(((part @ hessian[at, at]) * part).sum() / power)
    return [Layer(rows * min(size, columns - k * size), each) for k, each in enumerate(errors)]

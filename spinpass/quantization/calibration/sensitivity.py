"""What rounding a layer costs the predictions:  KL(p ‖ p̂) ≈ ½ E[ ‖ΔW x‖² · ‖g‖²/n ] nats,  g = ∂ log p(t)/∂y,  t ~ p.

With y = W x of n outputs that is the second-order term of the divergence, whose Hessian is the Fisher information, with
one curvature for all outputs of a token. The products of single outputs are left out, being noise at a few thousand
tokens. All a layer needs of the inputs is then H = Σ x xᵀ·‖g‖²/n, and the costs of layers add up to that of the
program. The error of outputs alone misleads: its sum is that of a few massive tokens, which predictions hardly depend
on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.execution import constants
from spinpass.graph import value
from spinpass.passes import open_program
from spinpass.progress import Progress

from ..layers import WeightSite, weight_sites
from ..rounding import Moments, rounded, rounded_by_gptq
from ..scheme import WEIGHT_BITS, Weights
from .curvature import NamedSites, curvature, draw_gradients
from .lockstep import OperandWatch, run_in_lockstep

_TINY = 1e-30


@dataclass(frozen=True)
class Layer:
    """What gets one width: so many weights, and by bits what rounding them costs in nats per token."""

    size: int
    costs: Mapping[int, float]


def sensitivities(
    program: ExportedProgram,
    how: Weights,
    names: Collection[str],
    inputs: Sequence[object],
    *,
    widths: Sequence[int] = WEIGHT_BITS,
    by_group: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, list[Layer]]:
    """What rounding costs the predictions, by name of a weight (out, in), in nats per token.

    It takes, beside the program, the memory of one input's backward pass and a float32 matrix (in, in) per layer.

    Args:
        program: of a language model, whose first output are logits (…, vocabulary). It is not changed.
        how: the scheme that rounds the weights, at each of ``widths``. GPTQ runs on the first half of the inputs, and
            without the descent that follows it: layers keep their order, and it takes half of the time.
        names: of the weights, which have two axes.
        inputs: as for :func:`spinpass.quantization.quantize`. The costs are measured on the second half.
        widths: in bits.
        by_group: the names of those weights whose groups are told apart.
        progress: called with (steps done, all steps).

    Returns:
        By name one :class:`Layer` for the whole weight, or one for each of its groups.

    Raises:
        ConfigError: the inputs do not fit the program, or its first output is no logits.
    """
    editor = open_program(program)
    named = [(site, editor.fqn(site.weight)) for site in weight_sites(editor)[0] if editor.fqn(site.weight) in names]
    prepared = editor.finish()
    if not named:
        return {}
    half = (len(inputs) + 1) // 2
    shown, judged = inputs[:half], inputs[half:] or inputs
    tick: Progress = progress or (lambda done, total: None)
    steps = len(judged) + len(named)
    weighted = _weighted_moments(prepared, named, judged, lambda done, _: tick(done, steps))
    stored = constants(prepared)
    found: dict[str, list[Layer]] = {}

    def watch(site: WeightSite, fqn: str) -> OperandWatch:
        def measure(values: list[Tensor], _: list[Tensor]) -> Mapping[str, Tensor]:
            if fqn not in found:  # a weight that is used twice is judged by both uses
                matrix = stored[site.weight.name].detach().movedim(site.dim, -1).float()
                size = how.group_size if fqn in by_group else None
                found[fqn] = _layers(matrix, Moments.of(values, values).own, weighted.pop(fqn), how, size, widths)
            return {}

        return measure

    watched = {site.linear.name: (site.operand.name, watch(site, fqn)) for site, fqn in named}
    run_in_lockstep(prepared, shown, watched, progress=lambda done, _: tick(len(judged) + done, steps))
    return found


def _layers(
    matrix: Tensor, hessian: Tensor, weighted: Tensor, how: Weights, size: int | None, widths: Sequence[int]
) -> list[Layer]:
    """The costs of a matrix (out, in), split into parts of ``size`` columns unless that is None.

    ``hessian`` and ``weighted`` are its second moments (in, in), without and with the curvature. GPTQ makes up across
    groups, and then the error of one by itself says little: what the layer costs is shared out as rounding to nearest
    would cost its groups.
    """
    rows, columns = matrix.shape
    parts = [slice(start, min(start + (size or columns), columns)) for start in range(0, columns, size or columns)]
    costs: list[dict[int, float]] = [{} for _ in parts]
    for bits in widths:
        scheme = replace(how, bits=bits, group_bits=None, sweeps=0)
        by_descent = how.method == "gptq" and bits < max(WEIGHT_BITS)  # the most bits cost nothing either way
        shares = [1.0]
        if len(parts) > 1 or not by_descent:
            off = rounded(matrix, scheme).dequantized() - matrix
            shares = [_cost(off[:, part], weighted[part, part]) for part in parts]
        whole = sum(shares)
        if by_descent:
            whole = _cost(rounded_by_gptq(matrix, hessian, scheme).dequantized() - matrix, weighted)
        for cost, share in zip(costs, shares):
            cost[bits] = whole * share / max(sum(shares), _TINY)
    return [Layer(rows * (part.stop - part.start), cost) for part, cost in zip(parts, costs)]


def _cost(off: Tensor, weighted: Tensor) -> float:
    """½ Σ ΔW H ΔWᵀ over outputs."""
    return float(((off @ weighted) * off).sum()) / 2


def _weighted_moments(
    program: ExportedProgram, named: NamedSites, inputs: Sequence[object], tick: Progress
) -> dict[str, Tensor]:
    """By name of a weight, the mean of x xᵀ·‖g‖²/n over tokens, float32 (in, in)."""
    operands = {fqn: value(site.operand) for site, fqn in named}
    found = {fqn: torch.zeros(x.shape[-1], x.shape[-1], device=x.device) for fqn, x in operands.items()}

    def receive(fqn: str, x: Tensor, gradient: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        found[fqn] += rows.T @ (rows * curvature(x.shape[:-1], gradient).unsqueeze(1))

    tokens = sum(draw_gradients(program, named, inputs, lambda x: x, receive, tick))
    return {fqn: total / tokens for fqn, total in found.items()}

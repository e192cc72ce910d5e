"""What rounding costs at each linear layer by itself:  ‖x̂ Ŵᵀ − x Wᵀ‖² / ‖x Wᵀ‖²,  every other layer left alone.

That is cheap enough to be asked of every layer of an original and of a rotated program. Weights are rounded to nearest,
whatever the method will be, so the error says which basis is better to round in, not how good the result will be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.export import ExportedProgram

from spinpass import operators
from spinpass.execution import constants
from spinpass.graph import shape
from spinpass.passes import open_program
from spinpass.progress import Progress

from ..layers import WeightSite, weight_sites
from ..rounding import rounded, static_range, token_clip
from ..scheme import FINE, Activations, QuantizationConfig, Weights
from .lockstep import OperandWatch, run_in_lockstep

_TINY = 1e-30
_Asked = tuple[Weights | None, Activations | None]


def site_errors(
    program: ExportedProgram,
    config: QuantizationConfig,
    inputs: Sequence[object],
    progress: Progress | None = None,
) -> dict[str, float]:
    """The error of each layer, by name of its weight, where ``config`` rounds the weight or the inputs.

    Weights of other than two axes have no entry. A weight that several layers share has the largest of their errors.

    Args:
        program: in floating point, rotated or not. It is not changed.
        config: what is rounded. Its caches, budget and rounds of distillation do not matter.
        inputs: as for :func:`spinpass.quantization.quantize`. A few hundred tokens will do.
        progress: called with (layers done, all layers).

    Raises:
        ConfigError: the inputs do not fit the program.
    """
    editor = open_program(program)
    sites, _ = weight_sites(editor)
    named = [(site, editor.fqn(site.weight)) for site in sites if len(shape(site.weight)) == 2]
    prepared = editor.finish()
    stored = constants(prepared)
    found: dict[str, float] = {}

    def watch(site: WeightSite, fqn: str, asked: _Asked) -> OperandWatch:
        def measure(values: list[Tensor], _: list[Tensor]) -> Mapping[str, Tensor]:
            matrix = stored[site.weight.name].detach().movedim(site.dim, -1).float()
            found[fqn] = max(found.get(fqn, 0.0), _error(values, matrix, *asked))
            return {}

        return measure

    watched = {}
    for site, fqn in named:
        asked = _asked(config, fqn, site.head)
        if asked != (None, None):
            watched[site.linear.name] = (site.operand.name, watch(site, fqn, asked))
    if watched:
        run_in_lockstep(prepared, inputs, watched, progress=progress)
    return found


def _asked(config: QuantizationConfig, fqn: str, head: bool) -> _Asked:
    """How the weight of a layer is rounded, and how its inputs are, None where they are not."""
    skipped = config.excludes(fqn) or (head and config.head is None)
    return config.weights_of(fqn, head=head), None if skipped else config.activations


def _error(values: list[Tensor], matrix: Tensor, scheme: Weights | None, activations: Activations | None) -> float:
    weight = matrix if scheme is None else rounded(matrix, scheme).dequantized()
    round_values = _rounding(values, activations)
    off = power = 0.0
    for value in values:
        x = value.float()
        exact = x @ matrix.T
        off += float((round_values(x) @ weight.T - exact).square().sum())
        power += float(exact.square().sum())
    return off / max(power, _TINY)


def _rounding(values: list[Tensor], scheme: Activations | None) -> Callable[[Tensor], Tensor]:
    """What rounds inputs of a layer, in ranges chosen on ``values``."""
    if scheme is None:
        return lambda x: x
    if not scheme.static:
        clip = scheme.clip
        if clip is None:  # as `quantize` chooses it
            clip = token_clip(values, scheme.bits, scheme.is_symmetric) if scheme.bits < FINE else 1.0
        return lambda x: operators.round_tokens(x, scheme.bits, scheme.is_symmetric, clip)
    found = static_range(values, scheme)
    return lambda x: operators.round_rows(x, found.scale, found.zero, found.limit, scheme.bits)

"""Mixed bit widths from a budget:  min Σ cost(layer, bits)  with  Σ weights · bits ≤ budget · Σ weights.

What every layer, or with mixed rows every group of its inputs, costs the predictions at every width is measured by
itself (:mod:`.sensitivity`). All begin at the fewest bits, and the step that lowers the sum by most per bit of storage
is taken until the budget is spent. The steps of a layer are those of the lower convex hull of its costs, so that a poor
width is jumped over. The greedy choice is then that of the Lagrangian.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.graph import shape
from spinpass.passes import open_program
from spinpass.progress import Progress

from ..layers import weight_sites
from ..packed import splittable
from ..scheme import WEIGHT_BITS, QuantizationConfig
from .sensitivity import Layer, sensitivities

_ENOUGH = 4  # bits: nothing gets fewer where the average has as many, for what that frees is less than it may cost
_Hull = list[tuple[int, float]]
_Key = TypeVar("_Key", str, tuple[str, int])


def allocated(
    program: ExportedProgram,
    config: QuantizationConfig,
    inputs: Sequence[object],
    progress: Progress | None = None,
) -> QuantizationConfig:
    """``config`` with an override for every weight of two axes, so that these have ``config.average_bits`` on average.

    Heads, and what overrides or exclusions name already, are left alone.

    Args:
        program: the original, as for :func:`spinpass.quantization.quantize`. It is not changed.
        config: with ``weights`` and ``average_bits``.
        inputs: as for :func:`spinpass.quantization.quantize`. The costs are measured on them.
        progress: called with (steps done, all steps).

    Raises:
        ConfigError: ``config`` has no ``average_bits`` or no ``weights``, the budget is outside of what the widths
            allow, or the inputs do not fit the program.
    """
    budget, how = config.average_bits, config.weights
    if budget is None or how is None:
        raise ConfigError("bits are allocated to weights within average_bits: name both")
    editor = open_program(program)
    sites = [s for s in weight_sites(editor)[0] if not (s.head or s.router) and len(shape(s.weight)) == 2]
    free = {fqn for fqn in (editor.fqn(s.weight) for s in sites) if config.weights_of(fqn, head=False) == how}
    by_group = splittable(program) & free if config.mixed_rows else set()
    widths = [bits for bits in WEIGHT_BITS if bits >= _ENOUGH or budget < _ENOUGH]
    costs = sensitivities(program, how, free, inputs, widths=widths, by_group=by_group, progress=progress)
    units = {(fqn, group): layer for fqn, layers in costs.items() for group, layer in enumerate(layers)}
    found: dict[str, list[int]] = {}
    for (fqn, _), bits in allocate(units, budget).items():  # in the order of the groups
        found.setdefault(fqn, []).append(bits)
    chosen = {fqn: replace(how, bits=max(each), group_bits=_uneven(each)) for fqn, each in found.items()}
    return replace(config, overrides={**config.overrides, **chosen}, average_bits=None, mixed_rows=False)


def _uneven(bits: Sequence[int]) -> tuple[int, ...] | None:
    return tuple(bits) if len(set(bits)) > 1 else None


def allocate(layers: Mapping[_Key, Layer], budget: float) -> dict[_Key, int]:
    """Bits for every layer, at most ``budget`` per weight on average.

    Raises:
        ConfigError: the fewest bits of all layers are more than the budget.
    """
    hulls = {name: _hull(layer.costs) for name, layer in layers.items()}
    chosen = {name: hull[0][0] for name, hull in hulls.items()}
    left = budget * sum(layer.size for layer in layers.values())
    left -= sum(chosen[name] * layer.size for name, layer in layers.items())
    if left < 0:
        raise ConfigError(f"{budget} bits per weight are fewer than the least, {min(WEIGHT_BITS)}")
    steps = [(_gain(hull, 0, layers[name]), name, 0) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, at = heapq.heappop(steps)
        hull, layer = hulls[name], layers[name]
        cost = (hull[at + 1][0] - hull[at][0]) * layer.size
        if cost > left:
            continue
        left -= cost
        chosen[name] = hull[at + 1][0]
        if at + 2 < len(hull):
            heapq.heappush(steps, (_gain(hull, at + 1, layer), name, at + 1))
    return chosen


def _hull(costs: Mapping[int, float]) -> _Hull:
    """(bits, cost) from the fewest bits on, every step lowering the cost by less per bit than the one before."""
    hull: _Hull = []
    for point in sorted(costs.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        if not hull or point[1] < hull[-1][1]:
            hull.append(point)
    return hull


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _gain(hull: _Hull, at: int, layer: Layer) -> float:
    """The change of the cost per bit of storage, negative: the least comes first."""
    return _slope(hull[at], hull[at + 1]) / layer.size

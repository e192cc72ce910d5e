"""Weights become codes, and ranges are chosen, while calibration inputs run through a program side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.export import ExportedProgram

from spinpass.execution import constants
from spinpass.graph import HOST, Handle, arguments, moved, shape, trim, values_of
from spinpass.progress import Progress

from ..layers import ChosenSites, WeightSite
from ..report import CodesStore, QuantizationReport, QuantizedWeight
from ..rounding import (
    Coded,
    Codes,
    ExpertMoments,
    Moments,
    experts_moments,
    rounded,
    rounded_by_gptq,
    stacked,
    static_range,
    token_clip,
)
from ..scheme import Weights
from .lockstep import SiteWatch

_LIMIT = 3  # of the arguments of round_rows
_CLIP = 3  # of those of round_tokens
_Known = Moments | Iterable[ExpertMoments] | None


@dataclass
class Calibrator:
    """Rounds the weights of a program: those that inputs reach when they come by, the rest at the end.

    Args:
        program: with the roundings of its ``sites`` in the graph. The arguments of these are set in place.
        sites: what is to be rounded.
        store: where the codes are kept, and found that another run has left; None keeps them in memory.

    Attributes:
        changed: by name of a placeholder, what computes the constant that it becomes.
        done: by parameter name, the weights that have been rounded.
    """

    program: ExportedProgram
    sites: ChosenSites
    store: CodesStore | None = None
    changed: dict[str, Callable[[], Tensor]] = field(default_factory=dict, init=False)
    done: dict[str, QuantizedWeight] = field(default_factory=dict, init=False)
    _seen: dict[str, Moments] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._constants = constants(self.program)
        self._nodes = {n.name: n for n in self.program.graph.nodes}
        self._stacks = {site.weight.name for site, _ in self.sites.weights if site.ends is not None}

    def watches(self) -> dict[str, SiteWatch]:
        """What to do at which node, as :func:`.lockstep.run_in_lockstep` takes it."""
        found: dict[str, SiteWatch] = {}
        for name, operand in self.sites.static.items():
            found[name] = (operand, lambda values, _, node=name: self._static(values, node))
        for name, operand in self.sites.clipped.items():
            found[name] = (operand, lambda values, _, node=name: self._clip(values, node))
        for site, scheme in self.sites.weights:
            operand = self.sites.inputs[site.linear.name]
            if site.ends is not None:
                found[site.linear.name] = (
                    operand,
                    lambda values, ends, s=site, how=scheme: self._weight(
                        s, how, lambda: experts_moments(values, ends)
                    ),  # type: ignore[misc]
                    site.ends.name,
                )
                continue
            found[site.linear.name] = (
                operand,
                lambda values, originals, s=site, how=scheme, x=operand: self._weight(
                    s, how, lambda: self._moments(x, values, originals, s)
                ),
            )
        return found

    def rest(self, progress: Progress | None) -> None:
        """Round to nearest what no calibration input has reached, and the tables."""
        todo = [(s.weight.name, s.dim, how) for s, how in self.sites.weights]
        todo += [(table.name, 1, how) for table, how in self.sites.tables]
        for k, (name, dim, scheme) in enumerate(todo):
            if self.sites.fqns[name] not in self.done:
                self._round(name, dim, scheme, lambda: None)
            if progress is not None:
                progress(k + 1, len(todo))

    def report(self, original: ExportedProgram) -> QuantizationReport:
        """What was done to the ``original`` program."""
        stored = original.state_dict
        before = sum(t.nbytes for t in stored.values())
        saved = sum(stored[name].nbytes - w.codes.nbytes for name, w in self.done.items() if name in stored)
        activations, caches = tuple(self.sites.activations), tuple(self.sites.caches)
        return QuantizationReport(self.done, activations, caches, self.sites.kept, before, before - saved)

    def _moments(self, operand: str, values: list[Tensor], originals: list[Tensor], site: WeightSite) -> Moments | None:
        """Of all inputs at once. None for weights with more axes than two, whose tokens are dealt out."""
        if len(shape(site.weight)) != 2:
            return None
        if operand not in self._seen:
            self._seen.clear()  # only neighbours share an input
            self._seen[operand] = Moments.of(values, originals)
        return self._seen[operand]

    def _weight(self, site: WeightSite, scheme: Weights, moments: Callable[[], _Known]) -> Mapping[str, Tensor]:
        name = site.weight.name
        if self.sites.fqns[name] in self.done:  # read before, by another layer
            return {}
        return {name: self._round(name, site.dim, scheme, moments)}

    def _round(self, name: str, dim: int, scheme: Weights, moments: Callable[[], _Known]) -> Tensor:
        """Round a weight unless that was done, and return what it has become."""
        fqn, stored = self.sites.fqns[name], self._constants[name].detach()
        weight = None if self.store is None else self.store.get(fqn, scheme)
        if weight is None:
            weight = _rounded(stored, dim, scheme, moments(), stack=stored.shape[0] if name in self._stacks else 1)
            if self.store is not None:
                weight = self.store.put(fqn, weight)
                trim()
        source = moved(Coded(weight.codes, dim, stored.shape, stored.dtype), stored.device)
        # the codes are kept, a quarter of what they stand for, on the host
        self.changed[name] = lambda: Handle(source) if isinstance(stored, Handle) else source.read(slice(None))
        self.done[fqn] = weight
        return self.changed[name]()

    def _clip(self, values: list[Tensor], name: str) -> Mapping[str, Tensor]:
        node = self._nodes[name]
        args = arguments(node)
        node.update_arg(_CLIP, token_clip(values, args["bits"], args["symmetric"]))
        return {}

    def _static(self, values: list[Tensor], name: str) -> Mapping[str, Tensor]:
        scheme = self.sites.config.activations
        assert scheme is not None
        found, node = static_range(values, scheme), self._nodes[name]
        node.update_arg(_LIMIT, found.limit)
        numbers = dict(zip((n.name for n in node.all_input_nodes[1:]), (found.scale, found.zero)))
        self.changed |= {name: lambda value=value: value for name, value in numbers.items()}
        return numbers


def _rounded(stored: Tensor, dim: int, scheme: Weights, moments: _Known, *, stack: int) -> QuantizedWeight:
    """Round a constant whose columns lie along ``dim``, or a stack of so many."""
    parts, errors, tokens = [], [], []
    if isinstance(moments, Moments):
        pairs: Iterable[tuple[Tensor, Moments | ExpertMoments | None]] = [(_matrix(stored, dim), moments)]
    elif moments is None or scheme.method != "gptq":
        pairs = ((matrix, None) for matrix in _matrices(stored, dim))
    else:
        pairs = zip(_stack(stored, dim), moments, strict=True)
    for matrix, known in pairs:
        part = _part(matrix, scheme, known).in_steps_of(stored.dtype, scheme.scales)
        errors.append(_error(matrix, part.dequantized(), known))
        parts.append(part.on(HOST))
        tokens += [] if known is None or isinstance(known, Moments) else [known.tokens]
    lost, size = (math.fsum(each) for each in zip(*errors, strict=True))
    return QuantizedWeight(stacked(parts), dim, scheme, lost / max(size, 1e-30), stack, tuple(tokens))


def _part(matrix: Tensor, scheme: Weights, moments: Moments | ExpertMoments | None) -> Codes:
    """Return the codes of one matrix."""
    if scheme.method != "gptq" or moments is None:
        return rounded(matrix, scheme)
    if isinstance(moments, ExpertMoments):
        return rounded_by_gptq(matrix, moments.own, scheme)
    target = moments.target(matrix, scheme.damping) if scheme.follow else matrix
    return rounded_by_gptq(target, moments.own, scheme, moments.factors)


def _matrix(stored: Tensor, dim: int) -> Tensor:
    """Return a constant as one float matrix (out, in) whose columns lie along ``dim``."""
    moved = values_of(stored).movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1]).float()


def _matrices(stored: Tensor, dim: int) -> Iterator[Tensor]:
    """Yield that matrix, or a block of its rows at a time where it is large and read when it is used."""
    if isinstance(stored, Handle) and dim % stored.ndim == stored.ndim - 1:
        for block in stored.blocks():
            yield block.reshape(-1, block.shape[-1]).float()
        return
    yield _matrix(stored, dim)


def _stack(stored: Tensor, dim: int) -> Iterator[Tensor]:
    """Yield the float matrices (out, in) of a stack, one at a time where it is read when it is used."""
    for i in range(stored.shape[0]):
        rows = slice(i, i + 1)
        lazy = isinstance(stored, Handle) and not stored.turned
        yield _matrix(stored.read(rows) if lazy else values_of(stored)[rows], dim)  # type: ignore[attr-defined]


def _error(matrix: Tensor, result: Tensor, moments: Moments | ExpertMoments | None) -> tuple[float, float]:
    """Return the squared error, and what it is relative to."""
    if isinstance(moments, Moments):
        return moments.error(matrix, result), 1.0
    if moments is not None:
        return moments.lost(matrix, result)
    return float((result - matrix).square().sum()), float(matrix.square().sum())

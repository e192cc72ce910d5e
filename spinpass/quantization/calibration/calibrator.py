"""Weights become codes, and ranges are chosen, while calibration inputs run through a program side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.execution import constants
from spinpass.graph import Handle, arguments, moved, shape
from spinpass.progress import Progress
from spinpass.workers import Team

from ..layers import ChosenSites, WeightSite
from ..report import CodesStore, QuantizationReport, QuantizedWeight
from ..rounding import Coded, Moments, experts_moments, median_peak, static_range, token_clip
from ..scheme import Weights
from .dealing import Dealer, Job, KnownInputs, keep, kept_by_all
from .lockstep import SiteWatch

_LIMIT = 3  # of the arguments of round_rows
_CLIP = 3  # of those of round_tokens
_OPERAND = 1  # of those of le, the limit
_BATCH = 1 << 26  # bytes of weights that each rank but one rounds in turn before they are exchanged
_Site = tuple[WeightSite, Weights]
_Asked = tuple[str, int, Weights]


@dataclass
class Calibrator:
    """Rounds the weights of a program: those that inputs reach when they come by, the rest at the end.

    Args:
        program: with the roundings of its ``sites`` in the graph. The arguments of these are set in place.
        sites: what is to be rounded.
        store: where the codes are kept, and found that another run has left; None keeps them in memory.
        team: the ranks that round together, each of which sees its share of the inputs.
        counts: by parameter name, for each input how much its tokens count, (tokens,); those of others all count 1.

    Attributes:
        changed: by name of a placeholder, what computes the constant that it becomes.
        done: by parameter name, the weights that have been rounded.
    """

    program: ExportedProgram
    sites: ChosenSites
    store: CodesStore | None = None
    team: Team = field(default_factory=Team)
    counts: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    changed: dict[str, Callable[[], Tensor]] = field(default_factory=dict, init=False)
    done: dict[str, QuantizedWeight] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._dealer = Dealer(self.team)
        self._constants = constants(self.program)
        self._nodes = {n.name: n for n in self.program.graph.nodes}
        self._stacks = {site.weight.name for site, _ in self.sites.weights if site.ends is not None}

    def watches(self) -> dict[str, SiteWatch]:
        """What to do at which node, as :func:`.lockstep.run_in_lockstep` takes it."""
        found: dict[str, SiteWatch] = {}
        for name, operand in self.sites.static.items():
            found[name] = (operand, lambda values, _, node=name: self._static(values, node))
        for name, (operand, limit, times) in self.sites.massive.items():
            found[name] = (operand, lambda values, _, node=limit, t=times: self._massive(values, node, t))
        for name, operand in self.sites.clipped.items():
            found[name] = (operand, lambda values, _, node=name: self._clip(values, node))
        for group in self._groups():
            for site, _ in group:  # the first that comes by rounds them all
                found[site.linear.name] = self._watch(group)
        return found

    def _watch(self, group: Sequence[_Site]) -> SiteWatch:
        site = group[0][0]
        operand, ends = self.sites.inputs[site.linear.name], site.ends
        if ends is not None:
            return (
                operand,
                lambda values, each: self._round(group, lambda: experts_moments(values, each, self.team)),
                ends.name,
            )
        if len(shape(site.weight)) != 2:  # which token goes to which matrix is for the program to say
            return operand, lambda *_: self._round(group, lambda: None)
        return (
            operand,
            lambda values, originals: self._round(
                group, lambda: Moments.of(values, originals, self.team, self._counts(group))
            ),
        )

    def _counts(self, group: Sequence[_Site]) -> list[Tensor] | None:
        """How much tokens count for weights that share their moments: the mean of what they do for each."""
        each = [self.counts[fqn] for fqn in (self.sites.fqns[s.weight.name] for s, _ in group) if fqn in self.counts]
        return [torch.stack(same).mean(0) for same in zip(*each, strict=True)] if each else None

    def rest(self, progress: Progress | None) -> None:
        """Round to nearest what no calibration input has reached, and the tables."""
        asked = [(site.weight.name, site.dim, how) for site, how in self.sites.weights]
        asked += [(table.name, 1, how) for table, how in self.sites.tables]
        for batch in self._batches(asked):
            self._rounded(batch, lambda: None)
            if progress is not None:
                progress(asked.index(batch[-1]) + 1, len(asked))

    def report(self, original: ExportedProgram) -> QuantizationReport:
        """What was done to the ``original`` program."""
        stored = original.state_dict
        before = sum(t.nbytes for t in stored.values())
        saved = sum(stored[name].nbytes - w.codes.nbytes for name, w in self.done.items() if name in stored)
        activations, caches = tuple(self.sites.activations), tuple(self.sites.caches)
        return QuantizationReport(self.done, activations, caches, self.sites.kept, before, before - saved)

    def _groups(self) -> list[list[_Site]]:
        """The weights that read the same inputs, which are rounded together; a stack of experts by itself."""
        found: dict[tuple[str, ...], list[_Site]] = {}
        for site, scheme in self.sites.weights:
            alone = site.ends is not None or len(shape(site.weight)) != 2
            key = (self.sites.inputs[site.linear.name], site.linear.name if alone else "")
            found.setdefault(key, []).append((site, scheme))
        return list(found.values())

    def _batches(self, asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Those that are not done, of as many bytes at a time as keep every rank busy."""
        batch, size = list[_Asked](), 0
        for each in asked:
            if self.sites.fqns[each[0]] in self.done or each[0] in {name for name, _, _ in batch}:
                continue
            batch.append(each)
            size += self._constants[each[0]].nbytes
            if size >= _BATCH * (self.team.size - 1):
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _round(self, group: Sequence[_Site], moments: Callable[[], KnownInputs]) -> Mapping[str, Tensor]:
        """Round weights unless that was done, and return what they have become."""
        named = {site.weight.name: (site.weight.name, site.dim, how) for site, how in group}
        # what was read before, by another layer, is done
        return self._rounded([each for n, each in named.items() if self.sites.fqns[n] not in self.done], moments)

    def _rounded(self, asked: Sequence[_Asked], moments: Callable[[], KnownInputs]) -> Mapping[str, Tensor]:
        if not asked:
            return {}
        jobs = [self._job(*each) for each in asked]
        weights = kept_by_all(self.team, self.store, jobs)
        missing = [job for job, weight in zip(jobs, weights, strict=True) if weight is None]
        made = iter(keep(self.team, self.store, missing, self._dealer.rounded(missing, moments())) if missing else [])
        found: dict[str, Tensor] = {}
        for (name, dim, _), job, kept in zip(asked, jobs, weights, strict=True):
            weight = next(made) if kept is None else kept
            self.done[job.name] = weight
            self.changed[name] = self._standing_for(Coded(weight.codes, dim, job.stored.shape, job.stored.dtype), job)
            found[name] = self.changed[name]()
        return found

    def _job(self, name: str, dim: int, scheme: Weights) -> Job:
        stored = self._constants[name].detach()
        return Job(self.sites.fqns[name], stored, dim, scheme, stored.shape[0] if name in self._stacks else 1)

    def _standing_for(self, codes: Coded, job: Job) -> Callable[[], Tensor]:
        """What computes a constant of its codes, which are kept on the host: a quarter of what they stand for."""
        source = moved(codes, job.stored.device)
        return lambda: Handle(source) if isinstance(job.stored, Handle) else source.read(slice(None))

    def _clip(self, values: list[Tensor], name: str) -> Mapping[str, Tensor]:
        node = self._nodes[name]
        args = arguments(node)
        beside = self.sites.beside.get(name)
        if beside is not None:
            limit = self._nodes[beside].args[_OPERAND]
            values = [each[each.abs().amax(-1) <= limit] for each in values]
        node.update_arg(_CLIP, token_clip(values, args["bits"], args["symmetric"], self.team))
        return {}

    def _massive(self, values: list[Tensor], name: str, times: float) -> Mapping[str, Tensor]:
        self._nodes[name].update_arg(_OPERAND, times * median_peak(values, self.team))
        return {}

    def _static(self, values: list[Tensor], name: str) -> Mapping[str, Tensor]:
        scheme = self.sites.config.activations
        assert scheme is not None
        found, node = static_range(values, scheme, self.team), self._nodes[name]
        node.update_arg(_LIMIT, found.limit)
        numbers = dict(zip((n.name for n in node.all_input_nodes[1:]), (found.scale, found.zero)))
        self.changed |= {name: lambda value=value: value for name, value in numbers.items()}
        return numbers

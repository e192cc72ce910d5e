"""Activations where a quantizer would round them, before and after rotation, in pairs by the weights beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.analysis import cache_values, find_attention
from spinpass.evaluation import ProgramScorer
from spinpass.execution import execute
from spinpass.graph import ProgramEditor, shape
from spinpass.passes import open_program
from spinpass.quantization import WeightSite, cache_sites, weight_sites

from .statistics import Accumulator, SiteStatistics

INPUT, KEY, VALUE, KEY_VALUE = "input", "key", "value", "key and value"


@dataclass(frozen=True)
class Name:
    """What a site is called in every program: its kind and the FQN of the weight that reads an input, or that made a
    key or a value; ``use`` counts from 0 where one weight is used several times.
    """

    kind: str
    weight: str
    use: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of {self.weight}" + (f", use {self.use + 1}" if self.use else "")


@dataclass(frozen=True)
class Pair:
    """One value before and after rotation, and all names that it has in both programs."""

    names: tuple[Name, ...]
    before: SiteStatistics
    after: SiteStatistics

    @property
    def kind(self) -> str:
        """The kind, which all names share."""
        return self.names[0].kind

    @property
    def weights(self) -> tuple[str, ...]:
        """The FQNs of the weights."""
        return tuple(name.weight for name in self.names)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        sides = {"before": self.before.to_dict(), "after": self.after.to_dict()}
        return {"kind": self.kind, "weights": list(self.weights), "use": self.names[0].use} | sides


@dataclass(frozen=True)
class Unpaired:
    """A site that cannot be compared, and why."""

    name: Name
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"site": str(self.name), "why": self.why}


def first_names(editor: ProgramEditor) -> dict[str, str]:
    """A map from every FQN of every stored constant to the first FQN of that constant."""
    stored = [node for node in editor.nodes if editor.is_stored(node)]
    names = {editor.fqn(node): editor.fqn(node) for node in stored}
    return names | {alias: editor.fqn(node) for node in stored for alias in editor.fqns(node)[1:]}


def find_sites(editor: ProgramEditor, names: Mapping[str, str] | None = None) -> dict[Node, list[Name]]:
    """Find every value that a linear layer reads and every key and value of attention, with its names, in graph order.

    ``names``: :func:`first_names` of the program whose layers count, by default this one; products with matrices that a
    pass has added are no layers.
    """
    known = first_names(editor) if names is None else names
    sites = [s for s in weight_sites(editor)[0] if editor.fqn(s.weight) in known and _reads_channels(s)]
    writers = {site.linear: known[editor.fqn(site.weight)] for site in sites}
    found: dict[Node, list[Name]] = {}
    uses: dict[tuple[str, str], int] = {}

    def add(node: Node, kind: str, weight: str) -> None:
        use = uses[kind, weight] = uses.get((kind, weight), -1) + 1
        found.setdefault(node, []).append(Name(kind, weight, use))

    for site in sites:
        add(site.operand, INPUT, writers[site.linear])
    kinds = _cache_kinds(editor)
    for node in cache_sites(editor):
        for weight in _made_by(node, writers) or [node.name]:
            add(node, kinds.get(node, KEY_VALUE), weight)
    return found


def _reads_channels(site: WeightSite) -> bool:
    """False for outer products, for example positions times frequencies."""
    return shape(site.operand)[-1] != 1


def _cache_kinds(editor: ProgramEditor) -> dict[Node, str]:
    kinds: dict[Node, str] = {}
    for attention in find_attention(editor):
        for kind, operand in ((KEY, attention.key), (VALUE, attention.value)):
            for node in cache_values(editor, operand):
                kinds[node] = kind if kinds.get(node, kind) == kind else KEY_VALUE
    return kinds


def _made_by(node: Node, writers: Mapping[Node, str]) -> list[str]:
    """The weights whose products a value consists of, the nearest on every path."""
    found: dict[str, None] = {}
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at in writers:
            found[writers[at]] = None
            continue
        fresh = [source for source in at.all_input_nodes if source not in seen]
        seen.update(fresh)
        todo += fresh
    return list(found)


class WatchedScorer:
    """Scores windows as :class:`spinpass.evaluation.ProgramScorer` does, and gathers the statistics of every site.

    ``like``: the scorer of the original program, whose layers count. ``left``: linear layers that are no sites, by
    node, and why; ``bytes``: those of all constants. Raises ConfigError as the scorer does.
    """

    def __init__(self, program: ExportedProgram, like: WatchedScorer | None = None) -> None:
        editor = open_program(program)
        self.names: Mapping[str, str] = first_names(editor) if like is None else like.names
        self._names = {node.name: names for node, names in find_sites(editor, self.names).items()}
        self.left = weight_sites(editor)[1]
        self.bytes = editor.nbytes()
        self._program = editor.finish()
        self._scorer = ProgramScorer(self._program)
        self._gathered: dict[str, Accumulator] = {}

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (length, vocabulary), float32."""

        def watch(node: Node, value: Any) -> Any:
            if node.name in self._names:
                self._gather(node.name, value)
            return value

        logits: Tensor = execute(self._program, self._scorer.inputs(ids), watch=watch).outputs[0]
        return logits[0].float()

    def _gather(self, name: str, value: Tensor) -> None:
        if name not in self._gathered:
            self._gathered[name] = Accumulator(value.shape[-1])
        self._gathered[name].update(value)

    def statistics(self) -> dict[Name, SiteStatistics]:
        """The statistics by every name of every site that was reached; the names of one site share one object."""
        results = {node: gathered.result() for node, gathered in self._gathered.items()}
        return {name: results[node] for node, names in self._names.items() if node in results for name in names}


def paired_sites(
    before: Mapping[Name, SiteStatistics], after: Mapping[Name, SiteStatistics]
) -> tuple[tuple[Pair, ...], tuple[Unpaired, ...]]:
    """Pair sites by name, those of one value in both programs together. Returns the pairs, and what has no partner."""
    left = {unpaired.name: unpaired for unpaired in _without_partner(before, after)}
    groups: dict[tuple[str, int, int], list[Name]] = {}
    for name in before:
        if name not in left:
            groups.setdefault((name.kind, id(before[name]), id(after[name])), []).append(name)
    pairs = (Pair(tuple(names), before[names[0]], after[names[0]]) for names in groups.values())
    return tuple(pairs), tuple(left.values())


def _without_partner(before: Mapping[Name, SiteStatistics], after: Mapping[Name, SiteStatistics]) -> Iterator[Unpaired]:
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield Unpaired(name, "the rotated program has no such site")
        elif name not in before:
            yield Unpaired(name, "only the rotated program has this site")
        elif len(before[name].peaks) != len(after[name].peaks):
            sizes = len(before[name].peaks), len(after[name].peaks)
            yield Unpaired(name, f"{sizes[0]} channels before, {sizes[1]} after: not the same value")

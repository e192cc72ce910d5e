"""The constants of a program, and the float64 arithmetic that is queued on them until the program is finished.

A pass queues steps and nothing is computed until :meth:`Constants.store` applies the whole queue to one constant at a
time (:mod:`.folding`), with a single cast at the end. So a plan costs no weight arithmetic, many folds that meet in one
constant round once, and memory stays near one constant above the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Node

from spinpass.errors import ProgramError
from spinpass.progress import Progress

from .folding import QueuedStep, folded, folded_float64
from .handles import Handle, storage_key
from .nodes import KNOWN, is_check

_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_SMALL = 4096  # elements up to which the values of an integer constant are shown to the analysis


@dataclass
class Constant:
    """A parameter, buffer or lifted tensor, with the arithmetic still to be done on it."""

    fqn: str
    tensor: Tensor
    steps: list[QueuedStep] = field(default_factory=list)

    def compute(self) -> Tensor:
        """Apply the queue in float64 and cast the result once, to the stored dtype; of a handle, when that is read.

        Raises:
            InvariantError: a step fails, or changes the shape.
        """
        if not self.steps:
            return self.tensor
        if isinstance(self.tensor, Handle):
            return self.tensor.folded(self.steps)
        return folded(self.tensor, self.steps)

    def compute_float64(self) -> Tensor:
        """Apply the queue in float64; what is not floating point is returned as it is stored.

        Raises:
            InvariantError: a step fails, or changes the shape.
        """
        if isinstance(self.tensor, Handle):
            return self.tensor.folded(self.steps).lifted(unrounded=bool(self.steps))
        return folded_float64(self.tensor, self.steps)


class Constants:
    """The constants of a copied program, by the placeholder that stands for each.

    One tensor that is stored under several names is one constant: all uses read the first of its placeholders that is
    used, and the others are its aliases, which nothing reads.

    Args:
        program: the program that was copied.
        placeholders: those of the copy, by name.
        updated: the names of the buffers that the program writes to, which are no constants.

    Raises:
        ProgramError: the program names a constant that it does not hold.
    """

    def __init__(self, program: ExportedProgram, placeholders: Mapping[str, Node], updated: Collection[str]) -> None:
        self._source = program
        self._all: dict[Node, Constant] = {}
        self._aliases: dict[Node, Node] = {}
        self._retired: dict[Node, float] = {}
        self.log: list[Node] = []  # the constant of every step queued, in that order
        stored: dict[tuple[Any, ...], Node] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind not in _KINDS or spec.target is None:
                continue
            node, tensor = placeholders[spec.arg.name], self._held(spec)
            self._all[node] = Constant(spec.target, tensor)
            if spec.target in updated:
                continue
            if _is_index(tensor):
                node.meta[KNOWN] = tensor.cpu()  # the analysis is on the host
            first = stored.setdefault(storage_key(tensor), node)
            if first is not node:
                self._aliases[node] = first
        self.updated = {n for n, c in self._all.items() if c.fqn in updated}
        self._merge_aliases()
        self.nbytes = sum(c.tensor.nbytes for n, c in self._all.items() if n not in self._aliases)

    def __contains__(self, node: object) -> bool:
        return node in self._all

    def __getitem__(self, node: Node) -> Constant:
        return self._all[node]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._all)

    def fqns(self, node: Node) -> list[str]:
        """Return all names under which the constant is stored, the node's own first."""
        return [self._all[n].fqn for n in (node, *(a for a, first in self._aliases.items() if first is node))]

    def has_alias(self, node: Node) -> bool:
        """Return whether the constant is stored under a further name, which nothing reads."""
        return node in self._aliases.values()

    def unused_name(self, name: str) -> str:
        """Return ``name``, with a number behind it where a constant has that name already."""
        taken = {c.fqn for c in self._all.values()}
        unused, k = name, 1
        while unused in taken:
            unused, k = f"{name}_{k}", k + 1
        return unused

    def add(self, node: Node, fqn: str, tensor: Tensor, steps: Iterable[QueuedStep]) -> None:
        """Let ``node`` stand for a new constant."""
        constant = self._all[node] = Constant(fqn, tensor, list(steps))
        self.log += [node] * len(constant.steps)
        self.nbytes += tensor.nbytes

    def queue(self, node: Node, step: QueuedStep) -> None:
        """Apply ``step`` to the constant when the program is finished."""
        self._all[node].steps.append(step)
        self.log.append(node)

    def part_with_alias(self, node: Node) -> Node | None:
        """Make one of the constant's aliases a constant of its own, equal to what ``node`` is by now, and return it.

        Return None where the constant has no alias.
        """
        alias = next((a for a, first in self._aliases.items() if first is node), None)
        if alias is not None:
            del self._aliases[alias]
            chief = self._all[node]
            self._all[alias] = Constant(self._all[alias].fqn, chief.tensor, list(chief.steps))
            self.log += [alias] * len(chief.steps)
            self.nbytes += chief.tensor.nbytes
        return alias

    def retire(self, node: Node, fill: float) -> None:
        """Store ``fill`` everywhere in the constant if nothing reads it when the program is finished."""
        self._retired[node] = fill

    def is_retired(self, node: Node) -> bool:
        """Return whether the constant was retired before."""
        return node in self._retired

    def exact(self) -> dict[str, Callable[[], Tensor]]:
        """Return by placeholder name what computes each edited constant in float64, before the cast to its dtype."""
        chiefs = {n: self._all[self._aliases.get(n, n)] for n in self._all}
        return {n.name: chief.compute_float64 for n, chief in chiefs.items() if chief.steps}

    def store(self, specs: Sequence[InputSpec], progress: Progress | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute every constant, one at a time; return the state dict and the other constants of the new program.

        Raises:
            InvariantError: the steps queued on a constant change its shape.
        """
        state_dict, constants = dict(self._source.state_dict), dict(self._source.constants)
        by_name = {s.arg.name: s for s in specs}
        for done, (node, constant) in enumerate(self._all.items()):
            spec = by_name[node.name]
            if constant.steps or (spec.target not in state_dict and spec.target not in constants):
                self._put(spec, constant.compute(), state_dict, constants)
            if progress is not None:
                progress(done + 1, len(self._all))
        for node, fill in self._retired.items():
            if all(map(is_check, node.users)):
                self._put(by_name[node.name], torch.full_like(self._all[node].tensor, fill), state_dict, constants)
        for name in (self._all[n].fqn for n in self.updated):  # the programs do not write into each other's states
            held = state_dict if name in state_dict else constants
            held[name] = held[name].detach().clone()
        for alias, chief in ((self._all[a].fqn, self._all[c].fqn) for a, c in self._aliases.items()):
            held = state_dict if chief in state_dict else constants
            (constants if alias in constants else state_dict)[alias] = held[chief]
        return state_dict, constants

    def _held(self, spec: InputSpec) -> Tensor:
        assert spec.target is not None
        found = self._source.state_dict.get(spec.target, self._source.constants.get(spec.target))
        if not isinstance(found, Tensor):
            raise ProgramError(f"the program names a constant {spec.target!r} that it does not hold")
        return found

    def _put(self, spec: InputSpec, tensor: Tensor, state_dict: dict[str, Any], constants: dict[str, Any]) -> None:
        assert spec.target is not None
        if spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and not spec.persistent):
            constants[spec.target] = tensor
            return
        old = self._source.state_dict.get(spec.target)
        wrap = spec.kind == InputKind.PARAMETER
        requires_grad = isinstance(old, torch.nn.Parameter) and old.requires_grad
        state_dict[spec.target] = torch.nn.Parameter(tensor, requires_grad=requires_grad) if wrap else tensor

    def _merge_aliases(self) -> None:
        """Let all uses of one stored tensor read the first of its placeholders that is used."""
        groups: dict[Node, list[Node]] = {}
        for alias, first in self._aliases.items():
            groups.setdefault(first, [first]).append(alias)
        self._aliases = {}
        for members in groups.values():
            chief = next((n for n in members if n.users), members[0])
            for node in members:
                if node is not chief:
                    node.replace_all_uses_with(chief)
                    self._aliases[node] = chief


def _is_index(tensor: Tensor) -> bool:
    """Return whether the tensor is a small one of int64, whose values are shown to the analysis."""
    small = tensor.dtype == torch.int64 and tensor.numel() <= _SMALL
    return small and not isinstance(tensor, (torch._subclasses.FakeTensor, Handle))

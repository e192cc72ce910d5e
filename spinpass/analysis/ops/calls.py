"""Calls: the arguments of an operator by the names of its schema, and whether a rule has accounted for all of them.

A rule that knows some arguments of an operator is wrong wherever the others matter. So what a builder does not account
for must be at its default, and a tensor that enters must stand in the rule; else the operator is opaque. A new rule is
held to that without a word of its own. Axes of integers, complex numbers and numbers of 8 bits have no basis: that is
checked here as well, once for all operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from spinpass.graph import arguments, differing, is_float, op_name, value

from .rules import (
    Centring,
    Concatenate,
    Ignored,
    Mean,
    Movement,
    Multilinear,
    Normalization,
    Opaque,
    Rule,
    Several,
    Square,
    VectorNorm,
    Zeros,
)


class Call(Mapping[str, Any]):
    """One call of an operator, by the arguments of its schema. It remembers which of them were accounted for.

    Attributes:
        operator: the node that calls the operator.
        node: the node whose value the rule is of, which is another one where the operator has several results.
        which: the index of that result, and None where the operator has one.
    """

    def __init__(self, operator: Node, node: Node | None = None, which: int | None = None) -> None:
        self.operator, self.node, self.which = operator, node or operator, which
        self._bound = arguments(operator)
        self._accounted: set[str] = set()
        self._shapes: set[Node] = set()

    def __getitem__(self, name: str) -> Any:
        found = self._bound[name]
        self._accounted.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._bound)

    def __len__(self) -> int:
        return len(self._bound)

    def __contains__(self, name: object) -> bool:
        return name in self._bound

    @property
    def name(self) -> str:
        """Return the operator's name."""
        return op_name(self.operator)

    def account(self, *names: str) -> None:
        """Note arguments that need no reading.

        Of tensors among them only the shape or dtype matters, or that they are zero. All else of them is seen in the
        shape of the result, or scales whole vectors, or acts along axes that the rule lets nothing pass.
        """
        self._accounted.update(names)
        for name in names:
            if isinstance(self._bound.get(name), Node):
                self.leave_out(self._bound[name])

    def leave_out(self, operand: Node) -> None:
        """Note a tensor whose elements do not matter."""
        self._shapes.add(operand)

    def axis(self, name: str, rank: int) -> int:
        """Return the axis that an argument names, counted from the first one."""
        axis: int = self[name] % max(rank, 1)
        return axis

    def axes(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the axes that an argument names, counted from the first one. None and [] name all of them."""
        given = self.get(name)
        if given is None or given in ([], ()):
            return tuple(range(rank))
        return tuple(d % max(rank, 1) for d in ([given] if isinstance(given, int) else given))

    def forgotten(self) -> str | None:
        """Return the first argument that is not at its default and was not accounted for, as a phrase."""
        for name, given in differing(self.operator).items():
            if name not in self._accounted and name not in _NO_EFFECT:
                return f"{name}={given}"
        return None

    def undeclared(self, rule: Rule) -> Node | None:
        """Return the first tensor that the operator reads and the rule does not mention."""
        mentioned = _operands(rule) | self._shapes
        return next(
            (n for n in self.operator.all_input_nodes if n not in mentioned and isinstance(value(n), Tensor)), None
        )


RuleBuilder = Callable[[Call], Rule]
"""What builds the rule of a call."""


def named(groups: list[tuple[RuleBuilder, str]]) -> dict[str, RuleBuilder]:
    """Return what builds the rule of each operator, from groups of ATen names that are built alike."""
    return {f"aten::{name}": builder for builder, names in groups for name in names.split()}


def answer(builder: RuleBuilder, call: Call) -> Rule:
    """Return the rule that is built for a call; Opaque where it does not account for the whole call."""
    rule = builder(call)
    if isinstance(rule, (Opaque, Several)):
        return rule
    if (forgotten := call.forgotten()) is not None:
        return Opaque(f"{call.name} with {forgotten}, of which its rule knows nothing")
    if (operand := call.undeclared(rule)) is not None:
        return Opaque(f"{call.name} reads {operand.name} in a way of which its rule knows nothing")
    return rule if isinstance(rule, (Ignored, Zeros)) else _typed(call, rule)


def _typed(call: Call, rule: Rule) -> Rule:
    """Return the rule with operands that can carry no axis opaque; Opaque where nothing can carry one."""
    if not is_float(call.node):
        return Opaque(f"{call.name} makes {_kind(call.node)}")
    if isinstance(rule, Multilinear):
        carrying = (o for term in rule.terms for o in term if any(label is not None for label in o.labels))
        added = {o.node: None for o in carrying if not is_float(o.node) and o.node not in rule.opaque}
        return replace(rule, opaque=(*rule.opaque, *added)) if added else rule
    sources = rule.sources if isinstance(rule, Concatenate) else [rule.source]  # type: ignore[union-attr]
    other = next((s for s in sources if not is_float(s)), None)
    return rule if other is None else Opaque(f"{call.name} of {_kind(other)}")


def _kind(node: Node) -> str:
    val = value(node)
    if not isinstance(val, Tensor):
        return "several results"
    return f"{str(val.dtype).removeprefix('torch.')} values, not floating point of 16 bits or more"


def _operands(rule: Rule) -> set[Node]:
    """Return the tensors that a rule mentions."""
    match rule:
        case Multilinear():
            return {o.node for term in rule.terms for o in term} | set(rule.opaque)
        case Concatenate():
            return set(rule.sources)
        case Centring():
            return {rule.source, rule.mean}
        case Normalization():
            return {n for n in (rule.source, rule.weight, rule.bias) if n is not None}
        case Movement() | Square() | VectorNorm() | Mean():
            return {rule.source}
        case _:
            return set()


_NO_EFFECT = {
    "dtype",  # the kind of the result is checked for all operators
    "out_dtype",
    "device",
    "layout",
    "pin_memory",
    "non_blocking",
    "copy",
    "memory_format",
    "implicit",
    "benchmark",
    "cudnn_enable",
    "cudnn_enabled",
    "deterministic",
    "padding_idx",  # of gradients, as the next three
    "scale_grad_by_freq",
    "sparse",
    "sparse_grad",
    "path",  # in which order an einsum is computed
    "output_size",  # what the repeats sum up to
}

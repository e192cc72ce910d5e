"""Constant expressions: nodes whose values depend on constants alone, such as ``1 + g`` or ``B @ A``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass.errors import InvariantError

from .constants import Constant, Constants
from .nodes import frozen, is_float, is_op, is_random, lifted, op_name, reachable, reads_bits, shape, value

_GATHERS = {"aten::index", "aten::index_select"}
_UNFILLED = {f"aten::{n}" for n in ("empty_like", "new_empty", "new_empty_strided", "empty_permuted")}
_REARRANGEMENTS = {
    f"aten::{n}"
    for n in (
        "transpose",
        "permute",
        "t",
        "numpy_T",
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "to",
        "_to_copy",
        "contiguous",
        "clone",
    )
}


class Expressions:
    """What is computed from the constants alone. Answers are remembered, so operands of a node must not change."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._is_constant: dict[Node, bool] = {}
        self._is_weight: dict[Node, bool] = {}
        self._first: dict[Hashable, Node] = {}
        self._canonical: dict[Node, Node] = {}

    def is_constant(self, node: Node) -> bool:
        """Return whether the value depends on parameters, buffers and lifted tensors only.

        What is drawn at random, or never written, is no constant. Its shape may depend on dynamic sizes.
        """
        known = self._is_constant.get(node)
        if known is None:
            if node.op == "placeholder":
                known = node in self._constants and node not in self._constants.updated
            else:
                tensors = [s for s in node.all_input_nodes if not isinstance(value(s), (int, torch.SymInt))]
                drawn = is_random(node) or op_name(node) in _UNFILLED
                known = is_op(node) and not drawn and bool(tensors) and all(map(self.is_constant, tensors))
            self._is_constant[node] = known
        return known

    def is_weight(self, node: Node) -> bool:
        """Return whether the node is a constant, or one matrix per token gathered from a constant stack of matrices.

        The latter are the experts of a mixture.
        """
        if self.is_constant(node):
            return True
        known = self._is_weight.get(node)
        if known is None:
            known = self._is_weight[node] = self._is_gathered(node)
        return known

    def _is_gathered(self, node: Node) -> bool:
        if not is_op(node) or not is_float(node) or not node.all_input_nodes:
            return False
        source = node.all_input_nodes[0]
        if op_name(node) in _GATHERS:
            return self.is_constant(source) and len(shape(source)) >= 3
        tensors = [s for s in node.all_input_nodes if isinstance(value(s), Tensor)]
        return op_name(node) in _REARRANGEMENTS and tensors == [source] and self.is_weight(source)

    def is_computable(self, node: Node) -> bool:
        """Return whether the node is a constant whose value no dynamic size goes into: it is known without a run."""
        return all(map(self.is_constant, reachable(node, self._operands)))

    def canonical(self, node: Node) -> Node:
        """Return the first node that computes the same constant expression: ``1 + g`` twice is one scale."""
        if not self.is_constant(node) or node in self._constants:
            return node
        if node not in self._canonical:
            for part in sorted(reachable(node, self._operands)):  # operands first, so that nothing recurs deeply
                if part not in self._canonical and part not in self._constants and self.is_constant(part):
                    key = (part.target, frozen((part.args, part.kwargs), self.canonical))
                    self._canonical[part] = self._first.setdefault(key, part)
        return self._canonical[node]

    def behind(self, node: Node) -> set[Node]:
        """Return the stored constants that a weight (:meth:`is_weight`) is made of.

        What only says which of a stack's matrices a token takes is no part of it: a router has the whole model before
        it.
        """
        weights = reachable(node, lambda n: filter(self.is_weight, self._operands(n)))
        return {n for n in weights if n in self._constants}

    def _operands(self, node: Node) -> Iterable[Node]:
        """Return what a node of an expression is computed from; nothing for a stored constant."""
        return () if node in self._constants else node.all_input_nodes

    def deferred(self, node: Node, given: Mapping[Node, Tensor] = MappingProxyType({})) -> Callable[[], Tensor]:
        """Return what computes the float64 value that a constant node has now, whatever is queued later.

        Nothing is computed yet. Casts to lower precision inside the expression are lifted to float64 as well.

        Args:
            node: the constant or expression of constants.
            given: values to take in place of those of some nodes.

        Raises:
            InvariantError: the node is no constant.
        """

        def operands(node: Node) -> Iterable[Node]:
            return () if node in given else self._operands(node)

        order = sorted(reachable(node, operands))
        steps = [self._step(n, given) for n in order]
        last = {operand: n for n in order for operand in operands(n)}

        def compute() -> Tensor:
            values: dict[Node, Tensor] = {}
            for here, step in steps:
                values[here] = step(values)
                for done in [n for n in operands(here) if last[n] is here]:
                    del values[done]
            return values[node]

        return compute

    def _step(self, node: Node, given: Mapping[Node, Tensor]) -> tuple[Node, Callable[[dict[Node, Tensor]], Tensor]]:
        """Return a node with what computes its value by those of its operands, as it is now."""
        if node in given:
            return node, lambda values: given[node]
        if node in self._constants:
            constant = self._constants[node]
            now = Constant(constant.fqn, constant.tensor, list(constant.steps))
            return node, lambda values: now.compute_float64()
        if not self.is_constant(node):
            raise InvariantError(f"{node.name} is not a constant")
        args, kwargs = lifted(node)
        target = node.target
        if reads_bits(node):
            source, kind = node.all_input_nodes[0], value(node.all_input_nodes[0]).dtype

            def reinterpret(values: dict[Node, Tensor]) -> Tensor:
                made: Tensor = values[source].to(kind).view(node.args[1])  # type: ignore[arg-type]
                return made.double() if is_float(node) else made

            return node, reinterpret

        def call(values: dict[Node, Tensor]) -> Tensor:
            actual_args, actual_kwargs = map_arg(args, values.__getitem__), map_arg(kwargs, values.__getitem__)
            with torch.no_grad():
                return target(*actual_args, **actual_kwargs)  # type: ignore[operator,no-any-return]

        return node, call

    def filling(self, node: Node, value: float) -> tuple[Node, float] | None:
        """Return the stored constant, and the number that makes the whole expression ``value`` where it fills it.

        Return None where the expression is computed from several constants, or from one in another way than as itself
        or as 1 + it.
        """
        behind = self.behind(node)
        if len(behind) != 1:
            return None
        (stored,) = behind
        tensor = self._constants[stored].tensor
        device = "cpu" if isinstance(tensor, torch._subclasses.FakeTensor) else tensor.device
        for fill in (value, 1.0 - value):  # the value itself, or its distance from 1
            filled = torch.full(tensor.shape, fill, dtype=torch.float64, device=device)
            if bool((self.deferred(node, {stored: filled})() == value).all()):
                return stored, fill
        return None

"""Constant expressions: nodes whose values depend on constants alone, such as ``1 + g`` or ``B @ A``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass.errors import InvariantError

from .constants import Constant, Constants
from .nodes import is_float, is_op, lifted, op_name, shape, value

_GATHERS = {"aten::index", "aten::index_select"}
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

    def is_constant(self, node: Node) -> bool:
        """Return whether the value depends on parameters, buffers and lifted tensors only.

        Its shape may depend on dynamic sizes.
        """
        known = self._is_constant.get(node)
        if known is None:
            if node.op == "placeholder":
                known = node in self._constants and node not in self._constants.updated
            else:
                tensors = [s for s in node.all_input_nodes if not isinstance(value(s), (int, torch.SymInt))]
                known = is_op(node) and bool(tensors) and all(self.is_constant(s) for s in tensors)
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
        if not self.is_constant(node):
            return False
        return node in self._constants or all(self.is_computable(s) for s in node.all_input_nodes)

    def canonical(self, node: Node) -> Node:
        """Return the first node that computes the same constant expression: ``1 + g`` twice is one scale."""
        if not self.is_constant(node) or node in self._constants:
            return node
        return self._first.setdefault((node.target, self._frozen(node.args), self._frozen(node.kwargs)), node)

    def _frozen(self, argument: Any) -> Hashable:
        """Return an argument as part of a key, which is the same for equal expressions."""
        if isinstance(argument, Node):
            return self.canonical(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self._frozen(a) for a in argument)
        if isinstance(argument, dict):
            return tuple((k, self._frozen(v)) for k, v in argument.items())
        return repr(argument)

    def behind(self, node: Node) -> set[Node]:
        """Return the stored constants that a constant expression is computed from."""
        if node in self._constants:
            return {node}
        return {stored for source in node.all_input_nodes for stored in self.behind(source)}

    def deferred(self, node: Node, given: Mapping[Node, Tensor] = MappingProxyType({})) -> Callable[[], Tensor]:
        """Return what computes the float64 value that a constant node has now, whatever is queued later.

        Nothing is computed yet. Casts to lower precision inside the expression are lifted to float64 as well.

        Args:
            node: the constant or expression of constants.
            given: values to take in place of those of some nodes.

        Raises:
            InvariantError: the node is no constant.
        """
        if node in given:
            return lambda: given[node]
        if node in self._constants:
            constant = self._constants[node]
            now = Constant(constant.fqn, constant.tensor, list(constant.steps))
            return now.compute_float64
        if not self.is_constant(node):
            raise InvariantError(f"{node.name} is not a constant")
        sources = {n: self.deferred(n, given) for n in node.all_input_nodes}
        args, kwargs = lifted(node)
        target = node.target

        def compute() -> Tensor:
            values = {n: source() for n, source in sources.items()}
            actual_args, actual_kwargs = map_arg(args, values.__getitem__), map_arg(kwargs, values.__getitem__)
            with torch.no_grad():
                return target(*actual_args, **actual_kwargs)  # type: ignore[operator,no-any-return]

        return compute

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

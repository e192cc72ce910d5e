"""What several runs of one graph share, while each of them runs the same node.

constants: read, folded and lifted once        large weights: each block of rows read once, multiplied for all runs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.graph import Handle, linear_together

_LARGE = 1 << 21  # bytes of a constant that was read, after which memory is given back


class _Run(Protocol):
    def operand(self, node: Node) -> Any:
        """Return what an operator is called with that reads the node."""


class Together:
    """What the runs of a graph share; they are told apart by identity."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}  # by the identity of a value: itself, and what was made of it
        self._products: dict[int, Tensor] = {}  # by the identity of a run
        self._node: Node | None = None
        self._runs: Sequence[_Run] = ()
        self._read = False

    def begin(self, node: Node, runs: Sequence[_Run]) -> None:
        """Take the node that these run next."""
        self._node, self._runs = node, runs

    def end(self) -> bool:
        """Let go of everything; return whether a large constant was read."""
        large = any(isinstance(constant, Handle) and constant.nbytes > _LARGE for constant, _ in self._made.values())
        read, self._read = large or self._read, False
        self._made.clear()
        self._products.clear()
        return read

    def once(self, value: Any, make: Callable[[Any], Any]) -> Any:
        """Return ``make(value)``, computed once for all."""
        known = self._made.get(id(value))
        if known is not None:
            return known[1]
        result = make(value)
        if result is not value and isinstance(result, Tensor):
            self._made[id(value)] = value, result
        return result

    def linear(self, run: _Run, x: Tensor, weight: Handle, bias: Tensor | None = None) -> Tensor:
        """Return the product of one run; the first that asks computes those of all that multiply by the same weight,
        each with the bias that it has computed."""
        if id(run) not in self._products:
            mine: dict[int, tuple[Tensor, Tensor | None]] = {id(run): (x, bias)}
            for other in self._runs:
                if other is not run:
                    its_x, its_weight, its_bias = self._operands(other)
                    if its_weight is weight and _is_like(its_x, x) and _is_like(its_bias, bias):
                        mine[id(other)] = its_x, its_bias
            self._read = True
            self._products = dict(zip(mine, linear_together(list(mine.values()), weight), strict=True))
        return self._products.pop(id(run))

    def _operands(self, run: _Run) -> tuple[Any, Any, Any]:
        """What a run calls the operator with: its input, its weight and its bias."""
        assert self._node is not None
        read = [run.operand(each) if isinstance(each, Node) else each for each in self._node.args]
        return (read[0], read[1], read[2] if len(read) > 2 else None)


def _is_like(value: Any, other: Tensor | None) -> bool:
    """Whether both are tensors that the same product takes, or none is one."""
    if not isinstance(value, Tensor) or other is None:
        return value is None and other is None
    return value.dtype == other.dtype and value.shape[-1:] == other.shape[-1:]


def is_in_parts(weight: Any) -> bool:
    """Return whether it is a weight that is not read as a whole, in a run without gradients."""
    if torch.is_grad_enabled() or not isinstance(weight, Handle):
        return False
    return weight.ndim == 2 and weight.is_large and not weight.turned

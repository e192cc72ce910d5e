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
        """Return the product of one run; the first that asks computes those of all."""
        if id(run) not in self._products:
            mine = {id(run): x}
            for other in self._runs:
                given = None if other is run else self._operand(other)
                if isinstance(given, Tensor) and (given.shape[-1:], given.dtype) == (x.shape[-1:], x.dtype):
                    mine[id(other)] = given
            self._read = True
            self._products = dict(zip(mine, linear_together(list(mine.values()), weight, bias), strict=True))
        return self._products.pop(id(run))

    def _operand(self, run: _Run) -> Any:
        assert self._node is not None
        read = self._node.args[0]
        return run.operand(read) if isinstance(read, Node) else None


def is_in_parts(weight: Any) -> bool:
    """Return whether it is a weight that is not read as a whole, in a run without gradients."""
    if torch.is_grad_enabled() or not isinstance(weight, Handle):
        return False
    return weight.ndim == 2 and weight.is_large and not weight.turned

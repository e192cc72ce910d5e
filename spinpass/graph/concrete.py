"""Numbers in the place of symbolic sizes:  s0, s1 + s0, …  ->  2, 3 + 2, …   so that a node can be run by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from .devices import HOST, placed
from .editor import ProgramEditor
from .nodes import value


class ConcreteSizes:
    """Small numbers for the symbols of a program, the same for a symbol wherever it stands, within its range.

    Args:
        example: take the sizes that the program was exported with, which fit together where symbols depend on each
            other without saying so (caches of several layers).
    """

    def __init__(self, *, example: bool = False) -> None:
        self._example = example
        self._chosen: dict[Any, int] = {}

    def of(self, size: Any) -> Any:
        """Return a plain number for a symbolic one, and everything else as it is.

        Raises:
            ValueError: no number can be told: the expression is none of sizes, or none of sizes so small.
        """
        if not isinstance(size, (SymInt, SymFloat, SymBool)):
            return size
        if self._example:
            if size.node.hint is None:
                raise ValueError(f"{size} had no number when the program was exported")
            return size.node.hint
        expression = size.node.expr
        ranges = size.node.shape_env.var_to_range
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._chosen:
                self._chosen[symbol] = _within(ranges.get(symbol), 2 + len(self._chosen) % 3)
        try:
            found = expression.xreplace(self._chosen)
        except ZeroDivisionError as error:
            raise ValueError(f"{size} divides by a size that is 0 where others are small") from error
        if getattr(found, "free_symbols", None):
            raise ValueError(f"{size} is no number")
        kind = bool if isinstance(size, SymBool) else float if isinstance(size, SymFloat) else int
        return kind(found)

    def shape(self, node: Node) -> tuple[int, ...]:
        """Return the sizes of a tensor as numbers."""
        return tuple(self.of(size) for size in value(node).shape)


def _within(bounds: Any, wanted: int) -> int:
    """Return the number of a range that is nearest to the one wanted."""
    if bounds is None:
        return wanted
    return int(min(max(wanted, bounds.lower), bounds.upper))


def drawn(editor: ProgramEditor, node: Node, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a value for a tensor of the graph: a constant of integers or booleans, of a size that is known without a
    run, is the program's own, others are 0 and 1, which is an index of every axis; floats are normal, in float64 or
    complex128. It is on the CPU, as is all that is run by itself."""
    val = value(node)
    if val.is_floating_point() or val.is_complex():
        kind = torch.complex128 if val.is_complex() else torch.float64
        return torch.randn(list(sizes), generator=generator, dtype=kind, device="cpu")
    if editor.is_computable(node):
        return editor.deferred(node)().cpu()
    return torch.randint(0, 2, list(sizes), generator=generator, device="cpu").to(val.dtype)


def called(node: Node, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run what a node calls on other arguments, without gradients and on the CPU, whatever device it names."""
    with torch.no_grad():
        return node.target(*placed(arguments, HOST), **placed(keywords, HOST))  # type: ignore[operator]

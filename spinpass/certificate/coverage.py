"""What the draws of a certificate did not reach: a branch not taken, a mask without zeros, ids not used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.execution import InputRole, UserInput, user_inputs
from spinpass.graph import arguments, is_op, op_name, value

_CHOICES = {"aten::where": "condition", "aten::masked_fill": "mask", "aten::masked_fill_": "mask"}


class Coverage:
    """What was seen of conditions and inputs over all runs of the original.

    Args:
        ep: the original.
    """

    def __init__(self, ep: ExportedProgram) -> None:
        self._inputs = user_inputs(ep)
        self._conditions = {c for node in ep.graph.nodes if (c := _condition(node)) is not None}
        self._seen: dict[Node, tuple[bool, bool]] = {}  # ever false, ever true
        self._lowest: dict[str, int] = {}
        self._highest: dict[str, int] = {}

    def watch(self, node: Node, result: Any) -> Any:
        """Note the value where it is a condition; return it."""
        if node in self._conditions:
            never, always = self._seen.get(node, (False, False))
            if isinstance(result, Tensor):
                if result.numel():
                    self._seen[node] = (never or not bool(result.all()), always or bool(result.any()))
            else:
                self._seen[node] = (never or not result, always or bool(result))
        return result

    def given(self, values: Mapping[str, Any]) -> None:
        """Note the inputs of a run."""
        for spec in self._inputs:
            held = values.get(spec.name)
            if isinstance(held, Tensor) and held.numel() and not held.is_floating_point() and not held.is_complex():
                low, high = (int(held.min()), int(held.max()))
                self._lowest[spec.name] = min(low, self._lowest.get(spec.name, low))
                self._highest[spec.name] = max(high, self._highest.get(spec.name, high))

    def lines(self) -> tuple[str, ...]:
        """Say what was not reached, a line for each."""
        return (*self._of_inputs(), *self._of_conditions())

    def _of_inputs(self) -> Iterable[str]:
        for spec in self._inputs:
            if spec.name not in self._highest:
                continue
            low, high = self._lowest[spec.name], self._highest[spec.name]
            if _is_mask(spec):
                if low == high:
                    yield f"{spec.name} never {1 if low == 0 else 0}"
            elif spec.bound is not None and spec.bound > 1 and high < spec.bound - 1:
                what = "ids" if spec.role is InputRole.LOOKUP else "positions"
                yield f"{spec.name}: {what} up to {high + 1} of {spec.bound}"

    def _of_conditions(self) -> Iterable[str]:
        for wanted, what in (((True, False), "false"), ((False, True), "true")):
            nodes = [node.name for node in self._conditions if self._seen.get(node) == wanted]
            if nodes:
                more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
                yield f"condition {min(nodes)}{more} always {what}: one branch not taken"


def _is_mask(spec: UserInput) -> bool:
    return spec.role is InputRole.MASK or spec.dtype is torch.bool


def _condition(node: Node) -> Node | None:
    """Return what decides between the two results of ``node``, where it computes one of two."""
    if node.op != "call_function":
        return None
    if op_name(node) == "cond":
        found = node.args[0]
    elif is_op(node) and op_name(node) in _CHOICES:
        found = arguments(node).get(_CHOICES[op_name(node)])
    else:
        return None
    if not isinstance(found, Node) or found.op == "get_attr":
        return None
    held = value(found)
    return found if not isinstance(held, Tensor) or held.dtype is torch.bool else None

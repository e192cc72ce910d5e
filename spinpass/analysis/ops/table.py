"""The table of operators: for each of them, what builds its rule from a call.

An operator that is not in the table is opaque: to refuse is always right. Every builder takes a call and returns the
rule; its docstring says what the operator does where the rule does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from spinpass.graph import is_op, op_name, remembered, shape, value

from .calls import Call, answer
from .indexing import INDEXING
from .movements import MOVEMENTS, PIECES, piece
from .products import CONTRACTIONS, PRODUCTS, attention, grouped_mm
from .reductions import REDUCTIONS, layer_norm
from .rules import Ignored, Opaque, Rule, Several
from .zeros import MAKERS


def rule_of(node: Node) -> Rule:
    """Return the rule of a node's operator, which is Opaque for operators that are not in the table."""
    return remembered(node, _rule)


def _rule(node: Node) -> Rule:
    if node.op == "call_function" and op_name(node) == "getitem":
        return _item(node)
    if not is_op(node):
        return Opaque(f"{op_name(node)} is not an operator on tensors")
    name = op_name(node)
    if name in _CHECKS:
        return Ignored()
    if name in _SEVERAL:
        return Several()
    builder = _TABLE.get(name)
    if builder is None:
        return Opaque(f"{name} does not commute with a rotation")
    return answer(builder, Call(node))


def may_contract(node: Node) -> bool:
    """Return whether the operator's rule may contract two operands: those of products may, not of sums or movements."""
    return op_name(node) in _CONTRACTIONS


def _item(node: Node) -> Rule:
    """Return the rule of one result of an operator that has several."""
    source, which = node.args
    if not isinstance(source, Node) or not is_op(source):
        return Opaque("getitem")
    name = op_name(source)
    if name in PIECES and isinstance(which, int):
        return answer(piece, Call(source, node, which))
    if name not in _SEVERAL:
        return Opaque(f"{name} does not commute with a rotation")
    if which != 0:
        return Opaque(f"the statistics of {name}")
    return answer(layer_norm if name in _NATIVE_NORMS else attention, Call(source, node, 0))


def tokens_per_call(inputs: Sequence[Node]) -> int:
    """Return how many tokens one call of the program processes, which is the elements of its first integer input.

    Axes of dynamic size count as 1.
    """
    for node in inputs:
        val = value(node)
        if isinstance(val, Tensor) and not val.is_floating_point() and val.ndim >= 1:
            return math.prod(s for s in shape(node) if isinstance(s, int)) or 1
    return 1


_GROUPED = {"transformers::grouped_mm_fallback": grouped_mm}
_TABLE = MOVEMENTS | PRODUCTS | INDEXING | REDUCTIONS | MAKERS | _GROUPED
_CONTRACTIONS = CONTRACTIONS | _GROUPED.keys()
_CHECKS = {
    "aten::_assert_tensor_metadata",
    "aten::sym_size",
    "aten::sym_numel",
    "aten::sym_stride",
    "aten::_assert_scalar",
}
_NATIVE_NORMS = {"aten::native_layer_norm", "aten::_fused_rms_norm"}
_NATIVE_ATTENTION = {
    f"aten::_scaled_dot_product_{kind}"
    for kind in ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
}
_SEVERAL = PIECES | _NATIVE_NORMS | _NATIVE_ATTENTION

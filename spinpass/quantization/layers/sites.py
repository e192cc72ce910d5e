"""Where a program is quantized: the weights and inputs of its linear layers, its tables, its keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import Node

from spinpass.analysis import Concatenate, Movement, Multilinear, find_attention, find_linears, rule_of, whole_axis
from spinpass.graph import Layout, LayoutError, ProgramEditor, is_float, op_name, shape

_OWN = "spinpass."  # what the names of constants begin with that the passes add
_PICKING = {"aten::topk", "aten::sort", "aten::argsort"}
_GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
_SCORING = {
    f"aten::{name}"
    for name in (
        "softmax", "_softmax", "log_softmax", "sigmoid", "tanh", "softplus", "sqrt", "add", "sub", "mul", "div", "to",
        "_to_copy", "view", "reshape", "flatten", "squeeze", "unsqueeze", "clone", "alias", "slice", "masked_fill",
    )
}  # fmt: skip


@dataclass(frozen=True)
class WeightSite:
    """A linear layer with a stored weight.

    Args:
        linear: the node of the product.
        operand: the node of the layer's input, whose last axis is contracted.
        weight: the placeholder of the stored weight.
        dim: the axis of the weight that is contracted.
        head: no other linear layer is behind this one.
        router: the largest of what it returns are picked, as a router picks experts: rounding changes which.
        ends: where the layer is a stack of matrices and the tokens are sorted by them, the node that says up to which
            token each matrix goes, int32 (matrices,).
    """

    linear: Node
    operand: Node
    weight: Node
    dim: int
    head: bool
    router: bool = False
    ends: Node | None = None


def weight_sites(editor: ProgramEditor) -> tuple[list[WeightSite], dict[str, str]]:
    """Every linear layer with a stored weight, in graph order, and by node name why the others are left out."""
    found, left = [], dict[str, str]()
    linears = list(find_linears(editor))
    leading = leading_to({linear.node for linear in linears}, editor.nodes)
    for linear in linears:
        stored = _stored(editor, linear.weight, linear.weight_dim)
        if linear.dim != len(shape(linear.operand)) - 1:
            left[linear.node.name] = "it contracts another axis than the last of its input"
        elif stored is None:
            left[linear.node.name] = "its weight is computed from several constants"
        elif editor.fqn(stored[0]).startswith(_OWN):
            left[linear.node.name] = "a factor of a rotation"
        else:
            head = linear.node not in leading
            picked, ends = _is_picked_from(linear.node), _ends(linear.node)
            found.append(WeightSite(linear.node, linear.operand, *stored, head, picked, ends))
    return found, left


def _ends(linear: Node) -> Node | None:
    """Return what says where the tokens of each matrix end, of a product with tokens that are sorted by matrix."""
    return linear.args[2] if op_name(linear) in _GROUPED and isinstance(linear.args[2], Node) else None


def _is_picked_from(node: Node) -> bool:
    """Whether the largest values of a node are picked, itself or what scales them alike."""
    return any(
        op_name(user) in _PICKING or (op_name(user) in _SCORING and _is_picked_from(user)) for user in node.users
    )


def table_sites(editor: ProgramEditor) -> Iterator[Node]:
    """The placeholder of every float table that is looked up by token, each once."""
    seen = set()
    for node in editor.nodes:
        if op_name(node) == "aten::embedding" and is_float(node):
            table = node.all_input_nodes[0]
            if editor.is_stored(table) and table not in seen:
                seen.add(table)
                yield table


def cache_sites(editor: ProgramEditor) -> list[Node]:
    """The nodes whose values a KV cache holds, one vector per head and token on the last axis.

    They are the keys and values of every attention, before heads are repeated and before they are joined with those of
    earlier tokens.
    """
    found: dict[Node, None] = {}
    for attention in find_attention(editor):
        for operand, layout in ((attention.key, attention.key_layout), (attention.value, attention.value_layout)):
            site = _before_repetition(editor, operand, layout)
            if site is not None:
                found[site] = None
    return list(found)


def _before_repetition(editor: ProgramEditor, node: Node, layout: Layout) -> Node | None:
    """The first node with whole vectors on its last axis, behind all movements and concatenations with earlier tokens.

    ``layout`` is where they lie in ``node``: a key in a spelled-out product is transposed. None where none has them so.
    """
    found: Node | None = None
    while layout.is_contiguous and layout.count == 1 and not editor.is_constant(node):
        if layout.dims == (len(shape(node)) - 1,):
            found = node
        if node.op != "call_function":
            break
        rule = rule_of(node)
        if isinstance(rule, Movement):
            try:
                node, layout = rule.source, rule.backward(layout)
            except LayoutError:
                break
        elif isinstance(rule, Concatenate) and rule.dim not in layout.dims:
            fresh = [s for s in rule.sources if s.op != "placeholder"]
            if len(fresh) != 1:
                break
            node = fresh[0]
        else:
            break
    return found


def _stored(editor: ProgramEditor, node: Node, dim: int) -> tuple[Node, int] | None:
    """The stored tensor that a weight is a view of, or was gathered from, and the axis there."""
    layout = whole_axis(node, dim)
    while not editor.is_stored(node):
        if node.op != "call_function":
            return None
        rule = rule_of(node)
        try:
            if isinstance(rule, Movement):
                node, layout = rule.source, rule.backward(layout)
            elif isinstance(rule, Multilinear) and len(rule.terms) == 1 == len(rule.terms[0]):
                operand, label = rule.terms[0][0], rule.out[layout.dims[0]]
                layout = Layout.full(operand.labels.index(label), layout.width)
                node = operand.node
            else:
                return None
        except (LayoutError, ValueError):
            return None
        if not layout.is_contiguous or layout.count != 1:
            return None
    return node, layout.dims[0]


def leading_to(targets: set[Node], nodes: Iterable[Node]) -> set[Node]:
    """Those of ``nodes``, which are in graph order, from which one of ``targets`` is reached."""
    found: set[Node] = set()
    for node in reversed(list(nodes)):
        if any(user in targets or user in found for user in node.users):
            found.add(node)
    return found

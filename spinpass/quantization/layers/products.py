"""The products of linear layers as they are spelled in a graph, and others in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from spinpass.graph import ProgramEditor, arguments, op_name, shape

from .sites import WeightSite, weight_sites

ORIGIN = "quantization"
"""What the nodes that quantization adds are said to come from."""

_PRODUCTS = {"aten::linear": ("input", "weight"), "aten::matmul": ("self", "other"), "aten::mm": ("self", "mat2")}
_TRANSPOSES = {"aten::t", "aten::transpose", "aten::permute", "aten::numpy_T"}


def sites_by_name(editor: ProgramEditor) -> dict[str, list[WeightSite]]:
    """The linear layers of every stored weight, by the name of the weight."""
    found: dict[str, list[WeightSite]] = {}
    for site in weight_sites(editor)[0]:
        found.setdefault(editor.fqn(site.weight), []).append(site)
    return found


def why_kept(editor: ProgramEditor, sites: Sequence[WeightSite]) -> str:
    """Why a weight, which ``sites`` read, keeps its float constant. Empty where it can be packed."""
    if not sites:
        return "no linear layer reads it"
    weight = sites[0].weight
    if len(shape(weight)) != 2:
        return f"its shape {list(shape(weight))} is that of several matrices"
    products = {site.linear for site in sites}
    for site in sites:
        if operands(site) is None:
            return f"{site.linear.name} ({op_name(site.linear)}) is no product with the weight as it is stored"
    other = [reader for reader in _readers(weight) if reader not in products]
    return f"{other[0].name} reads it too" if other else ""


def _readers(node: Node) -> list[Node]:
    """The nodes that read a matrix, itself or transposed."""
    found: list[Node] = []
    for user in node.users:
        found += _readers(user) if op_name(user) in _TRANSPOSES else [user]
    return found


def operands(site: WeightSite) -> Any:
    """(input, bias or None) of a layer that multiplies by its stored weight or the transpose, None for any other."""
    name, args = op_name(site.linear), arguments(site.linear)
    if name == "aten::addmm":
        plain = args["alpha"] == 1 == args["beta"] and len(shape(args["self"])) == 1
        x, weight, bias = (args["mat1"] if plain else None), args["mat2"], args["self"]
    elif name in _PRODUCTS:
        x, weight, bias = *(args[key] for key in _PRODUCTS[name]), args.get("bias")
    else:
        return None
    while op_name(weight) in _TRANSPOSES:
        weight = weight.all_input_nodes[0]
    return (x, bias) if weight is site.weight and x is site.operand else None


def replace_product(editor: ProgramEditor, node: Node, target: Callable[..., Any], *args: Any) -> None:
    """Put ``target(*args)`` in place of a layer. It takes over the record that the layer may carry."""
    made = editor.call(target, *args, after=node, origin=ORIGIN)
    made.meta["custom"] = {**node.meta.get("custom", {}), **made.meta["custom"]}
    editor.replace(node, made)

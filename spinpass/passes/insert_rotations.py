"""InsertRotations:  an entry x -> x R,  an exit x' -> x' Rᵀ.

What could not be folded stands in the graph as Hadamard operators, or as products with a stored matrix where the
rotation is dense.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from spinpass.analysis import Space
from spinpass.graph import Changes, Layout, ProgramEditor, arguments, op_name, shape, value
from spinpass.operators import HADAMARD
from spinpass.rotations import Rotation

from .site_pass import SitePass


def insert_rotations(editor: ProgramEditor, space: Space, rotation: Rotation, origin: str) -> Space:
    """Put the rotation at every entry of the space and its inverse at every exit, and return the space."""
    stored: dict[str, Node] = {}
    for entry in space.entries:
        node = editor.current(entry.node)
        users = [u for u in node.users if u not in entry.keep]
        rotated = node
        if entry.centre:
            mean = editor.call(
                torch.ops.aten.mean.dim, rotated, [entry.layout.dims[0]], True, after=rotated, origin=origin
            )
            rotated = editor.call(torch.ops.aten.sub.Tensor, rotated, mean, after=mean, origin=origin)
        rotated = rotate_value(editor, rotated, entry.layout, rotation, stored, origin)
        editor.replace(node, rotated, users)
    for leaving in space.exits:
        node = editor.current(leaving.node)
        restored = rotate_value(editor, node, leaving.layout, rotation, stored, origin, inverse=True)
        editor.replace(node, restored, leaving.users)
    return space


def rotate_value(
    editor: ProgramEditor,
    node: Node,
    layout: Layout,
    rotation: Rotation,
    stored: dict[str, Node],
    origin: str,
    inverse: bool = False,
) -> Node:
    """Insert nodes that compute ``x R`` (``x Rᵀ`` with ``inverse``) along the layout's one axis; return the last.

    Args:
        editor: the program.
        node: x, of any rank and floating dtype.
        layout: where the vectors lie in x, contiguous along one axis.
        rotation: R.
        stored: the constants of this rotation by what they are, to be made once for all values of a space.
        origin: the name of the space.
        inverse: insert the inverse.
    """
    dim, rank = layout.dims[0], len(shape(node))
    if dim != rank - 1:
        node = editor.call(torch.ops.aten.transpose.int, node, dim, rank - 1, after=node, origin=origin)
    apply = _dense if not rotation.is_structured else _hadamard
    node = apply(editor, node, layout, rotation, stored, origin, inverse)
    if dim != rank - 1:
        node = editor.call(torch.ops.aten.transpose.int, node, dim, rank - 1, after=node, origin=origin)
    return node


def _hadamard(
    editor: ProgramEditor,
    node: Node,
    layout: Layout,
    rotation: Rotation,
    stored: dict[str, Node],
    origin: str,
    inverse: bool,
) -> Node:
    """x -> x·diag(s)·H,  or  x -> x·Hᵀ·diag(s):  insert a structured rotation, or its inverse, along the last axis."""
    signs = _signs(editor, node, layout, rotation, stored, origin)
    if signs is not None and not inverse:
        node = editor.call(torch.ops.aten.mul.Tensor, node, signs, after=node, origin=origin)
    node = editor.call(torch.ops.spinpass.hadamard.default, node, rotation.order, inverse, after=node, origin=origin)
    if signs is not None and inverse:
        node = editor.call(torch.ops.aten.mul.Tensor, node, signs, after=node, origin=origin)
    return node


def _signs(
    editor: ProgramEditor, node: Node, layout: Layout, rotation: Rotation, stored: dict[str, Node], origin: str
) -> Node | None:
    """Return the stored signs (channels,) in the dtype of the value, or None where the rotation has none."""
    signs = rotation.signs()
    if signs is None:
        return None
    key = f"signs {value(node).dtype} {layout.count}"  # one space may have values of several types and head counts
    if key not in stored:
        tensor = signs.to(value(node).device, value(node).dtype).repeat(layout.count)
        stored[key] = editor.add_constant(f"spinpass.{_identifier(origin)}.signs", tensor)
    return stored[key]


def _dense(
    editor: ProgramEditor,
    node: Node,
    layout: Layout,
    rotation: Rotation,
    stored: dict[str, Node],
    origin: str,
    inverse: bool,
) -> Node:
    """x -> x·Q:  insert a rotation without structure, or its inverse, block by block along the last axis."""
    key = f"matrix {value(node).dtype}"
    if key not in stored:
        matrix = rotation.matrix()[: rotation.order, : rotation.order].contiguous().to(value(node).device)
        stored[key] = editor.add_constant(
            f"spinpass.{_identifier(origin)}.matrix", matrix.to(value(node).dtype), steps=[lambda _: matrix]
        )
    matrix_node, start = stored[key], node
    blocks = layout.sizes[0] // rotation.order
    if blocks > 1:
        node = editor.call(torch.ops.aten.unflatten.int, node, -1, [blocks, rotation.order], after=node, origin=origin)
    if inverse:
        matrix_node = editor.call(torch.ops.aten.t.default, matrix_node, after=node, origin=origin)
        node = editor.call(torch.ops.aten.matmul.default, node, matrix_node, after=matrix_node, origin=origin)
    else:
        node = editor.call(torch.ops.aten.matmul.default, node, matrix_node, after=node, origin=origin)
    if blocks > 1:
        node = editor.call(torch.ops.aten.flatten.using_ints, node, -2, -1, after=node, origin=origin)
    # a matrix product returns other strides than its operand had; views that follow need those of the operand
    like = editor.call(torch.ops.aten.empty_like.default, start, after=node, origin=origin)
    return editor.call(torch.ops.aten.copy.default, like, node, after=like, origin=origin)


def _identifier(origin: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in origin)


def _broken(editor: ProgramEditor, space: Space, rotation: Rotation, changes: Changes) -> str | None:
    """Check that every entry has one rotation and every exit one inverse, and that nothing reads past them."""
    if rotation.is_structured:
        hadamards = [arguments(n) for n in changes.made if op_name(n) == HADAMARD]
        made = (sum(not h["transpose"] for h in hadamards), sum(h["transpose"] for h in hadamards))
        if any(h["order"] != rotation.order for h in hadamards):
            return f"a Hadamard of another order than {rotation.order} was inserted"
    else:
        products = [n for n in changes.made if op_name(n) == "aten::matmul"]
        inverses = sum(op_name(n.all_input_nodes[-1]) == "aten::t" for n in products)
        made = (len(products) - inverses, inverses)
    due = (len(space.entries), len(space.exits))
    if made != due:
        return f"{made[0]} rotations and {made[1]} inverses were inserted, not {due[0]} and {due[1]}"
    for entry in space.entries:
        past = [u for u in editor.current(entry.node).users if u not in entry.keep and u not in changes.made]
        if past:
            return f"{past[0].name} still reads {entry.node.name} in the original basis"
    for leaving in space.exits:
        past = [u for u in leaving.users if u in editor.current(leaving.node).users]
        if past:
            return f"{past[0].name} reads {leaving.node.name} in the rotated basis"
    return None


INSERT_ROTATIONS = SitePass(
    "InsertRotations",
    applies=lambda space: bool(space.online),
    run=insert_rotations,
    broken=_broken,
)

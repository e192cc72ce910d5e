"""InsertRotations:  an entry x -> x R,  or x R⁻ᵀ on the dual side of products;  an exit x' -> x' R⁻¹.

What could not be folded stands in the graph as Hadamard operators, or as products with stored factors where the
rotation is none of them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.analysis import Space
from spinpass.graph import Changes, Layout, ProgramEditor, arguments, op_name, same_strides, shape, value
from spinpass.operators import HADAMARD
from spinpass.rotations import SCALED, Rotation, hadamard

from .site_pass import SitePass

_INVERSE, _DUAL = "_inverse", "_dual"


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
        rotated = rotate_value(editor, rotated, entry.layout, rotation, stored, origin, dual=entry.dual)
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
    dual: bool = False,
) -> Node:
    """Insert nodes that compute ``x R`` (``x R⁻¹``, ``x R⁻ᵀ``) along the layout's one axis; return the last.

    Args:
        editor: the program.
        node: x, of any rank and floating dtype.
        layout: where the vectors lie in x, contiguous along one axis.
        rotation: R.
        stored: the constants of this rotation by what they are, to be made once for all values of a space.
        origin: the name of the space.
        inverse: insert the inverse.
        dual: insert the inverse transposed, which is R itself where R is orthogonal.
    """
    dim, rank = layout.dims[0], len(shape(node))
    if dim != rank - 1:
        node = editor.call(torch.ops.aten.transpose.int, node, dim, rank - 1, after=node, origin=origin)
    if rotation.is_structured:
        node = _hadamard(editor, node, layout, rotation, stored, origin, inverse, dual)
    else:
        node = _product(editor, node, layout, rotation, stored, origin, inverse, dual)
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
    dual: bool,
) -> Node:
    """x -> x·diag(d)·H,  or  x -> x·Hᵀ·diag(1/d):  insert a structured rotation, its inverse or dual, on the last axis.

    Scales are multiplied in the precision of the arithmetic, since what has folded into the weights is their exact
    inverse; signs change no precision.
    """
    diagonal = rotation.diagonal(dual=dual != inverse)
    hadamards = (torch.ops.spinpass.hadamard.default, rotation.order, inverse)
    chain = _Chain(editor, node, origin)
    if diagonal is None:
        chain.call(*hadamards)
        return chain.last
    dtype = value(node).dtype
    compute = hadamard.precision_of(value(node)) if diagonal.is_floating_point() else dtype
    if compute != dtype:
        chain.call(torch.ops.aten.to.dtype, compute)
    vector = _vector(editor, chain.last, layout, diagonal, stored, origin, dual=dual != inverse)
    scaled = (torch.ops.aten.mul.Tensor, vector)
    for call in (hadamards, scaled) if inverse else (scaled, hadamards):
        chain.call(*call)
    if compute != dtype:
        chain.call(torch.ops.aten.to.dtype, dtype)
    return chain.last


def _vector(
    editor: ProgramEditor,
    node: Node,
    layout: Layout,
    diagonal: Tensor,
    stored: dict[str, Node],
    origin: str,
    *,
    dual: bool,
) -> Node:
    """Return stored signs or scales (channels,) in the dtype of the value, made once for a space."""
    what = f"scales{_DUAL if dual else ''}" if diagonal.is_floating_point() else "signs"
    key = f"{what} {value(node).dtype} {layout.count}"  # a space may have values of several types and head counts
    if key not in stored:
        exact = diagonal.to(value(node).device, torch.float64).repeat(layout.count)
        stored[key] = editor.add_constant(
            f"spinpass.{_identifier(origin)}.{what}", exact.to(value(node).dtype), steps=[lambda _: exact]
        )
    return stored[key]


def _product(
    editor: ProgramEditor,
    node: Node,
    layout: Layout,
    rotation: Rotation,
    stored: dict[str, Node],
    origin: str,
    inverse: bool,
    dual: bool,
) -> Node:
    """x -> x·(I ⊗ F1 ⊗ F2 …):  insert a stored matrix, its inverse or its dual, factor by factor along the last axis.

    The last factor is multiplied from the right, the others, transposed, from the left, so that no axis is moved.
    """
    chain = _Chain(editor, node, origin)
    factors = rotation.operands(inverse=inverse, dual=dual)
    dtype = value(node).dtype
    compute = hadamard.precision_of(value(node)) if rotation.factors else dtype
    if compute != dtype:
        chain.call(torch.ops.aten.to.dtype, compute)
    size, behind = layout.sizes[0], 1
    for place, factor in reversed(list(enumerate(factors))):
        f = len(factor)
        ahead = size // (behind * f)
        view = [*([ahead] if ahead > 1 else []), f, *([behind] if behind > 1 else [])]
        if len(view) > 1:
            chain.call(torch.ops.aten.unflatten.int, -1, view)
        operand = _factor(
            editor, factor if behind == 1 else factor.t(), stored, rotation, origin, place, inverse, dual, chain
        )
        chain.multiply(operand, left=behind > 1)
        if len(view) > 1:
            chain.call(torch.ops.aten.flatten.using_ints, -len(view), -1)
        behind *= f
    if compute != dtype:
        chain.call(torch.ops.aten.to.dtype, dtype)
    if same_strides(chain.last, node):
        return chain.last
    # a matrix product returns other strides than its operand had; views that follow need those of the operand
    like = editor.call(torch.ops.aten.empty_like.default, node, after=chain.last, origin=origin)
    return editor.call(torch.ops.aten.copy.default, like, chain.last, after=like, origin=origin)


def stored_factors(editor: ProgramEditor, rotation: Rotation, space: str) -> dict[str, tuple[int, bool, bool]]:
    """Return the constants that stand for the factors of a space's Kronecker product, by the name of the parameter.

    Each with the number of the factor, and whether it is the inverse, and whether it is transposed, because all but
    the last are multiplied from the left, and the dual of a factor is its inverse transposed. They are found where the
    space's products read them.
    """
    found: dict[str, tuple[int, bool, bool]] = {}
    for node in editor.nodes:
        if op_name(node) != "aten::matmul" or node.meta.get("custom", {}).get("spinpass_origin") != space:
            continue
        for stored in filter(editor.is_stored, node.all_input_nodes):
            told = re.search(rf"\.factor(\d+)({_INVERSE}|{_DUAL})?(_\d+)?$", editor.fqn(stored))
            if told is not None:
                place = int(told[1]) - 1
                turned = (place < len(rotation.factors) - 1) != (told[2] == _DUAL)
                found[editor.fqn(stored)] = (place, told[2] is not None, turned)
    return found


def _factor(
    editor: ProgramEditor,
    factor: Tensor,
    stored: dict[str, Node],
    rotation: Rotation,
    origin: str,
    place: int,
    inverse: bool,
    dual: bool,
    chain: _Chain,
) -> Node:
    """Return the stored factor (f, f) in the dtype of the values, made once for a space."""
    held = value(chain.last)
    form = _DUAL if dual and rotation.factors else _INVERSE if inverse and rotation.factors else ""
    key = f"factor {place} {held.dtype} {form}"
    turned = inverse and not form  # the transpose of the one that is stored
    matrix = (factor.t() if turned else factor).contiguous().to(held.device)
    if key not in stored:
        name = "matrix" if not rotation.factors else f"factor{place + 1}"
        stored[key] = editor.add_constant(
            f"spinpass.{_identifier(origin)}.{name}{form}",
            matrix.to(held.dtype),
            steps=[lambda _: matrix],
        )
    if not turned:
        return stored[key]
    return editor.call(torch.ops.aten.t.default, stored[key], after=chain.last, origin=origin)


class _Chain:
    """Nodes in a row, each of which reads the one before."""

    def __init__(self, editor: ProgramEditor, first: Node, origin: str) -> None:
        self.last = first
        self._editor, self._origin = editor, origin

    def call(self, target: Any, *args: Any) -> None:
        """Append ``target(last, *args)``."""
        self.last = self._editor.call(target, self.last, *args, after=self.last, origin=self._origin)

    def multiply(self, matrix: Node, *, left: bool) -> None:
        """Append the product with a matrix, from the left or from the right."""
        pair = (matrix, self.last) if left else (self.last, matrix)
        after = matrix if matrix.op == "call_function" else self.last
        self.last = self._editor.call(torch.ops.aten.matmul.default, *pair, after=after, origin=self._origin)


def _identifier(origin: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in origin)


def _broken(editor: ProgramEditor, space: Space, rotation: Rotation, changes: Changes) -> str | None:
    """Check that every entry has one rotation and every exit one inverse, and that nothing reads past them."""
    if rotation.is_structured:
        hadamards = [arguments(n) for n in changes.made if op_name(n) == HADAMARD]
        made = (sum(not h["transpose"] for h in hadamards), sum(h["transpose"] for h in hadamards))
        duals = sum(_reads(editor, n, f"scales{_DUAL}") for n in changes.made if op_name(n) == "aten::mul")
        due_duals = len(space.exits) + sum(e.dual for e in space.entries)
        if rotation.kind == SCALED and duals != due_duals:
            return f"{duals} values were scaled by the inverse, not {due_duals}"
        if any(h["order"] != rotation.order for h in hadamards):
            return f"a Hadamard of another order than {rotation.order} was inserted"
    else:
        products = [n for n in changes.made if op_name(n) == "aten::matmul"]
        inverses, each = sum(_is_inverse(editor, n) for n in products), len(rotation.operands())
        duals, due_duals = sum(_reads(editor, n, _DUAL) for n in products), sum(e.dual for e in space.entries)
        if rotation.factors and duals != each * due_duals:
            return f"{duals} products with dual factors were inserted, not {each} for each of {due_duals} entries"
        if inverses % each or len(products) % each:
            return f"{len(products)} products with factors were inserted, of {each} to a rotation"
        made = ((len(products) - inverses) // each, inverses // each)
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


def _is_inverse(editor: ProgramEditor, product: Node) -> bool:
    """Return whether a product is with the inverse: a stored factor of it, or the transpose of an orthogonal one."""
    stored = [n for n in product.all_input_nodes if editor.is_stored(n)]
    return not stored or _reads(editor, product, _INVERSE)


def _reads(editor: ProgramEditor, product: Node, form: str) -> bool:
    """Return whether a product is with a stored factor of that form."""
    stored = (editor.fqn(n) for n in product.all_input_nodes if editor.is_stored(n))
    return any(re.search(rf"{form}(_\d+)?$", name) for name in stored)


INSERT_ROTATIONS = SitePass(
    "InsertRotations",
    applies=lambda space: bool(space.online),
    run=insert_rotations,
    broken=_broken,
)

"""FuseNormScale:  (x̂·g + β) Wᵀ + b  ->  x̂ (W diag(g))ᵀ + (b + β Wᵀ);   (y·c) with y = W x  ->  (diag(c) W) x.

It moves only the scales that the basis analysis found to be read by linears alone (or written by them alone). Half of a
norm operator's work is kept: ``layer_norm`` with a scale becomes ``layer_norm`` without one, ``rms_norm`` likewise.

Source: SliceGPT, Ashkboos et al., arXiv 2401.15024, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from spinpass.analysis import AxisType, ConstantUse, Multilinear, Normalization, ShiftUse, Space, rule_of
from spinpass.graph import Changes, ProgramEditor, arguments, op_name, shape, value
from spinpass.rotations import Rotation

from .site_pass import SitePass


def fuse_norm_scale(editor: ProgramEditor, space: Space, origin: str) -> Space:
    """Move every pending scale and shift of the space into the constants that carry it.

    Return the space with the biases that had to be made, where they write into it.
    """
    made = [(use.node, _shift_result(editor, use, origin)) for use in space.shifts]
    for use in space.shifts:
        editor.retire(use.shift, 0.0)
    for constant in space.constants:
        if constant.type.pending is not None and constant.type.pending.scale is not None:
            _scale(editor, editor.current(constant.node), constant.type)
            editor.retire(constant.type.pending.scale, 1.0)
    for node in space.scales:
        _unscale(editor, node, space, origin)
    written = tuple(
        ConstantUse(bias, replace(axis, layout=axis.layout.renamed(dict.fromkeys(axis.layout.dims, 0))))
        for node, bias in made
        if bias is not None
        for axis in space.members.get(node, ())
    )
    return replace(space, constants=space.constants + written)


def _scale(editor: ProgramEditor, node: Node, axis: AxisType) -> None:
    """Queue ``v -> v · scale`` for the vectors of the axis in the constant."""
    assert axis.pending is not None and axis.pending.scale is not None
    scale = editor.deferred(axis.pending.scale)
    layout = axis.layout
    alike = value(axis.pending.scale).numel() == layout.width  # all vectors are scaled alike
    editor.queue(
        node,
        lambda tensor: layout.apply(
            tensor, lambda vectors, dim: vectors * _along(scale(), layout.width, dim, vectors.ndim)
        ),
        layout.dims if alike else None,
    )


def _along(scale: Tensor, width: int, dim: int, rank: int) -> Tensor:
    """Return the scale with its coordinates on axis ``dim`` of ``rank`` axes.

    Where it holds one scale for each of many vectors, those lie on the axis before it.
    """
    dim %= rank
    if scale.numel() == width:
        return scale.flatten().view(tuple(-1 if d == dim else 1 for d in range(rank)))
    blocks = scale.flatten().view(-1, width)
    return blocks.view(tuple(blocks.shape[d - dim + 1] if d in (dim - 1, dim) else 1 for d in range(rank)))


def _unscale(editor: ProgramEditor, node: Node, space: Space, origin: str) -> None:
    """Take the scale or shift out of the operator that applies it."""
    rule = rule_of(node)
    if isinstance(rule, Normalization):
        return _strip_norm(editor, node, rule, origin)
    assert isinstance(rule, Multilinear)
    source = next(o.node for term in rule.terms for o in term if not editor.is_constant(o.node))
    editor.replace(node, as_dtype(editor, source, node, origin))


def as_dtype(editor: ProgramEditor, source: Node, like: Node, origin: str) -> Node:
    """Cast ``source`` to the dtype of ``like``: type promotion by the scale must not get lost with it."""
    if value(source).dtype == value(like).dtype:
        return source
    return editor.call(torch.ops.aten.to.dtype, source, value(like).dtype, after=source, origin=origin)


def _strip_norm(editor: ProgramEditor, node: Node, rule: Normalization, origin: str) -> None:
    """norm(x)·g + β  ->  norm(x):  replace the norm by one of the same family without scale and bias."""
    if rule.weight is None and rule.bias is None:
        return
    args = (rule.source, [int(shape(rule.source)[-1])])  # type: ignore[call-overload]
    if rule.centres:
        plain = editor.call(torch.ops.aten.layer_norm.default, *args, None, None, rule.eps, after=node, origin=origin)
    else:
        plain = editor.call(torch.ops.aten.rms_norm.default, *args, None, rule.eps, after=node, origin=origin)
    editor.replace(node, as_dtype(editor, plain, node, origin))


def _shift_result(editor: ProgramEditor, use: ShiftUse, origin: str) -> Node | None:
    """b -> b + β Wᵀ:  add to the bias what the shift becomes.

    Where there is no b, or it has other users, make a new one and return it; return None otherwise.
    """
    shift, weight = editor.deferred(use.shift), editor.deferred(use.weight)
    contract: Callable[[], Tensor]
    if op_name(use.node) == "aten::linear":
        contract = lambda: weight() @ shift().flatten()  # noqa: E731
    else:
        contract = lambda: shift().flatten() @ weight()  # noqa: E731
    args = arguments(use.node)
    bias = (
        args.get("bias")
        if op_name(use.node) == "aten::linear"
        else args.get("self")
        if op_name(use.node) == "aten::addmm"
        else None
    )
    if isinstance(bias, Node) and editor.is_stored(bias) and len(bias.users) == 1:
        editor.queue(bias, lambda tensor: tensor + contract())
        return None
    out = int(shape(use.node)[-1])  # type: ignore[call-overload]
    name = _bias_name(editor, use.weight)
    dtype, device = value(use.node).dtype, value(use.node).device
    start = editor.deferred(bias) if isinstance(bias, Node) else None
    zero = torch.zeros(out, dtype=dtype, device=device)
    added = editor.add_constant(
        name, zero, steps=[lambda tensor: (tensor if start is None else tensor + start()) + contract()]
    )
    if op_name(use.node) == "aten::linear":
        use.node.update_arg(2, added) if len(use.node.args) > 2 else _append(use.node, added)
    elif isinstance(bias, Node):
        use.node.replace_input_with(bias, added)
    else:
        users = list(use.node.users)
        total = editor.call(torch.ops.aten.add.Tensor, use.node, added, after=use.node, origin=origin)
        editor.replace(use.node, total, users)
    return added


def _append(node: Node, bias: Node) -> None:
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
    node.args = (*node.args[:2], bias)


def _bias_name(editor: ProgramEditor, weight: Node) -> str:
    """Return the name of the bias that belongs to a weight."""
    stored = weight
    while not editor.is_stored(stored) and stored.all_input_nodes:
        stored = stored.all_input_nodes[0]
    fqn = editor.fqn(stored)
    return fqn[: -len("weight")] + "bias" if fqn.endswith("weight") else fqn + "_bias"


def _broken(editor: ProgramEditor, space: Space, rotation: Rotation, changes: Changes) -> str | None:
    """Check that every pending scale is in its constant and every shift in a bias, and that nothing applies them."""
    for use in space.constants:
        pending, constant = use.type.pending, editor.current(use.node)
        if pending is not None and pending.scale is not None and not changes.queued.get(constant):
            return f"{editor.fqn(constant)} did not take over the scale {editor.fqn(pending.scale)}"
    for node in space.scales:
        if node.users and not _has_no_scale(node):
            return f"{node.name} still applies a scale that was moved"
    for shift in space.shifts:
        around = {*shift.node.all_input_nodes, *(n for user in shift.node.users for n in user.all_input_nodes)}
        biases = [n for n in around if editor.is_stored(n) and n is not editor.current(shift.weight)]
        if not any(n in changes.made or n in changes.queued for n in biases):
            return f"no bias of {shift.node.name} took over the shift {editor.fqn(shift.shift)}"
    return None


def _has_no_scale(node: Node) -> bool:
    rule = rule_of(node)
    return isinstance(rule, Normalization) and rule.weight is None and rule.bias is None


FUSE_NORM_SCALE = SitePass(
    "FuseNormScale",
    applies=lambda space: bool(space.scales or space.shifts) or any(c.type.pending for c in space.constants),
    run=lambda editor, space, rotation, name: fuse_norm_scale(editor, space, name),
    broken=_broken,
)

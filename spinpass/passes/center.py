"""Center:  LayerNorm(x) = RMSNorm(C x), C = I − 11ᵀ/n:  every writer W -> C W, b -> C b, and the norms stop centring.

This is exact where every reader of the stream centres it; the basis analysis has made sure of that.

Source: SliceGPT, Ashkboos et al., arXiv 2401.15024, section 3.2.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from spinpass.analysis import Centring, Normalization, Space, rule_of
from spinpass.graph import Changes, Layout, ProgramEditor, shape
from spinpass.rotations import Rotation

from .fuse_norm_scale import as_dtype
from .site_pass import SitePass


def center(editor: ProgramEditor, space: Space, origin: str) -> Space:
    """Centre what constants write into the stream, let its norms stop centring, and return the space.

    Entries are centred where they are rotated.
    """
    if not space.centred:
        return space
    for use in space.constants:
        if not use.type.centred:
            layout = use.type.layout
            editor.queue(editor.current(use.node), lambda tensor, at=layout: _centred(tensor, at), layout.dims)  # type: ignore[misc]
    for node in space.centrings:
        _stop_centring(editor, node, origin)
    return space


def _centred(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    return layout.apply(tensor, lambda vectors, dim: vectors - vectors.mean(dim, keepdim=True))


def _stop_centring(editor: ProgramEditor, node: Node, origin: str) -> None:
    rule = rule_of(node)
    if isinstance(rule, Centring):
        editor.replace(node, as_dtype(editor, rule.source, node, origin))  # the mean may have been of another one
        return
    norm = editor.current(node)  # its scale may have been fused
    plain = rule_of(norm)
    assert isinstance(plain, Normalization)
    width = int(shape(plain.source)[-1])  # type: ignore[call-overload]
    rms = editor.call(
        torch.ops.aten.rms_norm.default, plain.source, [width], None, plain.eps, after=norm, origin=origin
    )
    editor.replace(norm, rms)


def _broken(editor: ProgramEditor, space: Space, rotation: Rotation, changes: Changes) -> str | None:
    """Check that what writes into the stream is centred, and that no norm of it centres any more."""
    for use in space.constants:
        if not use.type.centred and not changes.queued.get(editor.current(use.node)):
            return f"{editor.fqn(editor.current(use.node))} writes into the stream and is not centred"
    for node in space.centrings:
        norm = rule_of(editor.current(node)) if isinstance(rule_of(node), Normalization) else None
        if node.users or (isinstance(norm, Normalization) and norm.centres):
            return f"{node.name} still centres"
    return None


CENTER = SitePass(
    "Center",
    applies=lambda space: space.centred,
    run=lambda editor, space, rotation, name: center(editor, space, name),
    broken=_broken,
)

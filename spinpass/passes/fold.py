"""FoldRotations:  reader W -> W R⁻ᵀ;  writer W -> Rᵀ W, b -> Rᵀ b;  table E -> E R.

In row-vector form all of these are one operation: every vector of the space that lies in the constant is multiplied by
R, or by R⁻ᵀ where it is contracted with vectors of the space, which is R again for an orthogonal one. What makes
values that are in the dual basis, such as queries, has the other one of the two. It is one step per constant, computed
at the end.

Source: computational invariance, SliceGPT, Ashkboos et al., arXiv 2401.15024, section 3.1.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.fx import Node

from spinpass.analysis import Space
from spinpass.graph import Changes, Layout, ProgramEditor
from spinpass.rotations import Rotation

from .site_pass import SitePass


def fold_rotation(editor: ProgramEditor, space: Space, rotation: Rotation) -> Space:
    """Queue the rotation on every constant of the space, and return the space."""
    for use in space.constants:
        rotate_constant(editor, editor.current(use.node), use.type.layout, rotation, dual=use.dual)
    return space


def rotate_constant(
    editor: ProgramEditor, node: Node, layout: Layout, rotation: Rotation, *, dual: bool = False
) -> None:
    """Queue ``v -> v R``, or ``v R⁻ᵀ`` with ``dual``, for the vectors of ``layout`` in the stored constant ``node``."""

    def rotated(vectors: Tensor, dim: int) -> Tensor:
        return rotation.apply(vectors, dim, dual=dual)

    editor.queue(node, lambda tensor: layout.apply(tensor, rotated), layout.dims)


def _broken(editor: ProgramEditor, space: Space, rotation: Rotation, changes: Changes) -> str | None:
    """Check that every constant got as many steps as it has axes in the space, and that the graph stayed as it is."""
    if changes.graph:
        return "the graph is another one, although only constants are folded"
    due = Counter(editor.current(use.node) for use in space.constants)
    for node in due.keys() | changes.queued.keys():
        if due[node] != changes.queued.get(node, 0):
            return f"{editor.fqn(node)} was folded {changes.queued.get(node, 0)} times, not {due[node]} times"
    return None


FOLD_ROTATIONS = SitePass(
    "FoldRotations",
    applies=lambda space: bool(space.constants),
    run=lambda editor, space, rotation, name: fold_rotation(editor, space, rotation),
    broken=_broken,
)

"""FoldRotations:  reader W -> W R;  writer W -> Rᵀ W, b -> Rᵀ b;  table E -> E R.   One step per constant, computed
at the end.

In row-vector form all of these are one operation: every vector of the space that lies in the constant is multiplied
by R.
"""

from __future__ import annotations

from torch.fx import Node

from spinpass.analysis import Space
from spinpass.graph import Layout, ProgramEditor
from spinpass.rotations import Rotation


def fold_rotation(editor: ProgramEditor, space: Space, rotation: Rotation) -> Space:
    """Queue the rotation on every constant of the space."""
    for use in space.constants:
        rotate_constant(editor, editor.current(use.node), use.type.layout, rotation)
    return space


def rotate_constant(editor: ProgramEditor, node: Node, layout: Layout, rotation: Rotation) -> None:
    """Queue ``v -> v R`` for the vectors of ``layout`` in the constant."""
    editor.queue(node, lambda tensor: layout.apply(tensor, lambda vectors, dim: rotation.apply(vectors, dim)))

"""Materialize:  an expression of constants that must change  ->  a stored constant.   W = f(A, B)  ->  W

It applies only where the change cannot go into A and B themselves, because f is not a movement of their elements.
"""

from __future__ import annotations

from spinpass.analysis import Space
from spinpass.graph import Changes, ProgramEditor
from spinpass.rotations import Rotation

from .site_pass import SitePass


def materialize_expressions(editor: ProgramEditor, space: Space) -> Space:
    """Give every computed constant of the space a stored tensor of its own, and return the space.

    Its value is the one before anything is queued for this space.
    """
    for node in {use.node: None for use in space.constants}:
        if not editor.is_stored(editor.current(node)):
            editor.materialize(node)
    return space


def _broken(editor: ProgramEditor, space: Space, rotation: Rotation, changes: Changes) -> str | None:
    """Check that every constant of the space is stored by now."""
    computed = [use.node for use in space.constants if not editor.is_stored(editor.current(use.node))]
    return f"{computed[0].name} is still computed from other constants" if computed else None


MATERIALIZE = SitePass(
    "Materialize",
    applies=lambda space: any(use.node.op != "placeholder" for use in space.constants),
    run=lambda editor, space, rotation, name: materialize_expressions(editor, space),
    broken=_broken,
)

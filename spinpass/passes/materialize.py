"""Materialize:  an expression of constants that must change  ->  a stored constant.   W = f(A, B)  ->  W

Only where the change cannot go into A and B themselves, because f is not a movement of their elements.
"""

from __future__ import annotations

from spinpass.analysis import Space
from spinpass.graph import ProgramEditor


def materialize(editor: ProgramEditor, space: Space) -> Space:
    """Give every computed constant of the space a tensor of its own, with its value before anything is queued for
    this space.
    """
    for node in {use.node: None for use in space.constants}:
        if not editor.is_stored(editor.current(node)):
            editor.materialize(node)
    return space

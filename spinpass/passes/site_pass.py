"""What all edits of a decided space have in common: a guard, the edit, and what must hold behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spinpass.analysis import Space
from spinpass.graph import Changes, ProgramEditor
from spinpass.rotations import Rotation


@dataclass(frozen=True)
class SitePass:
    """One edit of a program for a decided space.

    Args:
        name: what the pass is called in messages and dumps.
        applies: the guard. For a space for which it is false nothing is run.
        run: the edit, given the editor, the space, its rotation and its name. It returns the space with what it has
            added to it.
        broken: the check, given the editor, the space that ``run`` was given, its rotation and what has changed. It
            returns what does not hold although the edit has run, or None where everything holds.
    """

    name: str
    applies: Callable[[Space], bool]
    run: Callable[[ProgramEditor, Space, Rotation, str], Space]
    broken: Callable[[ProgramEditor, Space, Rotation, Changes], str | None]

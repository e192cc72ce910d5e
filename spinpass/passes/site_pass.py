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

    ``applies``: the guard; a space without anything of the kind is not touched. ``run``: the edit, given the editor,
    the space, its rotation and its name; returns the space with what the edit has added to it. ``broken``: what does
    not hold although the edit has run, given the editor, the space as it was given, its rotation and what has changed;
    None where everything holds.
    """

    name: str
    applies: Callable[[Space], bool]
    run: Callable[[ProgramEditor, Space, Rotation, str], Space]
    broken: Callable[[ProgramEditor, Space, Rotation, Changes], str | None]

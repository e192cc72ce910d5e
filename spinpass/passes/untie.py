"""Untie:  one constant that its uses need in different bases  ->  one constant per use."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from ..program import ProgramEditor


def untie(editor: ProgramEditor, constants: Iterable[Node]) -> list[Node]:
    """Give every use of the constants but the first one a copy; returns the new constants."""
    copies = []
    for node in constants:
        stored = node
        while not editor.is_stored(stored):
            stored = stored.all_input_nodes[0]
        copies += [editor.split(stored, [user]) for user in list(stored.users)[1:]]
    return copies

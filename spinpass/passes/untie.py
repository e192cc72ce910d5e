"""Untie:  one constant that its uses need in different bases  ->  one constant per use."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from spinpass.graph import ProgramEditor


def untie(editor: ProgramEditor, constants: Iterable[Node]) -> list[Node]:
    """Give every use of the constants but one a copy; returns the new constants.

    Exported, all uses of a tied constant read the last of its names, and uses come in the order of the names. So where
    there are several names the last use keeps its constant, and the table stays the table, the head the head.
    """
    copies = []
    for node in constants:
        stored = node
        while not editor.is_stored(stored):
            stored = stored.all_input_nodes[0]
        users = list(stored.users)
        moved = users[:-1] if editor.has_alias(stored) else users[1:]
        copies += [editor.split(stored, [user]) for user in moved]
    return copies

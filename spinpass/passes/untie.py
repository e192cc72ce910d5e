"""Untie:  one constant that its uses need in different bases  ->  one constant per use."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from spinpass.graph import ProgramEditor


def untie(editor: ProgramEditor, constants: Iterable[Node]) -> list[Node]:
    """Give every use of the constants but one a copy, and return the copies.

    In an exported program all uses of a tied constant read the last of its names, and uses come in the order of the
    names. So where there are several names the last use keeps its constant, and the table stays the table, the head
    the head.
    """
    copies = []
    for node in constants:
        stored = _leaf(editor, node)
        users = list(stored.users)
        moved = users[:-1] if editor.has_alias(stored) else users[1:]
        copies += [editor.split(stored, [user]) for user in moved]
    return copies


def still_tied(editor: ProgramEditor, constants: Iterable[Node]) -> str | None:
    """Return a sentence that names a constant with several uses, or None where each has one."""
    for node in constants:
        stored = _leaf(editor, node)
        if len(stored.users) > 1:
            return f"{editor.fqn(stored)} is still read by {', '.join(user.name for user in stored.users)}"
    return None


def _leaf(editor: ProgramEditor, node: Node) -> Node:
    """Return the stored constant that an expression of constants begins with."""
    while not editor.is_stored(node):
        node = node.all_input_nodes[0]
    return node

"""Tables as a notebook shows them: HTML in which every text is escaped, in the colours of the page around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol


def notebook_table(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: int = 0,
    notes: Iterable[str] = (),
) -> str:
    """Return a table with a title above and notes below it.

    Args:
        title: what the table is of.
        head: the names of the columns.
        rows: their cells, of which ``str`` is shown, escaped.
        numbers: how many columns, the last ones, are numbers, and aligned to the right.
        notes: sentences, one a line.
    """
    first = len(head) - numbers
    body = "".join(_row("td", row, first) for row in rows)
    table = f"<table><thead>{_row('th', head, first)}</thead><tbody>{body}</tbody></table>"
    return f"<div><b>{escape(title)}</b>{table}{notebook_lines(notes)}</div>"


def notebook_lines(lines: Iterable[str]) -> str:
    """Return lines of text below each other, escaped."""
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


class Shown(Protocol):
    """A value that a notebook shows as HTML."""

    def _repr_html_(self) -> str: ...


def notebook_parts(*values: Shown | None) -> str:
    """Return what a notebook shows of values, one below the other; None stands for nothing."""
    return "".join(value._repr_html_() for value in values if value is not None)


def _row(kind: str, cells: Sequence[object], first: int) -> str:
    sides = ("right" if k >= first else "left" for k in range(len(cells)))
    made = (f'<{kind} style="text-align: {side}">{escape(str(cell))}</{kind}>' for cell, side in zip(cells, sides))
    return f"<tr>{''.join(made)}</tr>"

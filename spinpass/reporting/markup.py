"""HTML out of values: every string is escaped, and only :class:`Html` is taken literally."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup that is escaped already."""


def html(value: object) -> Html:
    """A value as markup, escaped unless it is markup already."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def tag(name: str, *children: object, **attributes: str) -> Html:
    """``<name …>children</name>``; a trailing underscore of an attribute's name is dropped."""
    inside = "".join(f' {key.rstrip("_")}="{escape(text)}"' for key, text in attributes.items())
    return Html(f"<{name}{inside}>{''.join(map(html, children))}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: int, caption: str = "") -> Html:
    """A table whose last ``numbers`` columns are numbers. It scrolls sideways where it does not fit."""
    first = len(head) - numbers

    def cells(kind: str, values: Sequence[object]) -> Html:
        made = (tag(kind, v, **({"class_": "number"} if k >= first else {})) for k, v in enumerate(values))
        return tag("tr", *made)

    body = tag("tbody", *(cells("td", row) for row in rows))
    parts = [tag("caption", caption)] if caption else []
    return tag("div", tag("table", *parts, tag("thead", cells("th", head)), body), class_="scroll")


def details(summary: str, *children: object) -> Html:
    """Parts that are folded until they are asked for."""
    return tag("details", tag("summary", summary), *children)


def section(identifier: str, title: str, *children: object) -> Html:
    """A section with a heading that the contents link to."""
    return tag("section", tag("h2", title), *children, id=identifier)



"""Whatever is not markup already is escaped."""

from __future__ import annotations

from spinpass.reporting.markup import Html, table, tag


def test_markup_escapes_everything_but_markup() -> None:
    assert tag("p", "<b>", Html("<i>x</i>"), title='a"b') == '<p title="a&quot;b">&lt;b&gt;<i>x</i></p>'
    made = table(("a", "<b>"), [("<c>", 1.5)], numbers=1, caption="<d>")
    assert '<td class="number">1.5</td>' in made and "<td>&lt;c&gt;</td>" in made and "&lt;d&gt;" in made

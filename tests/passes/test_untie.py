"""A shared constant becomes one for each of its uses."""

from __future__ import annotations

from spinpass.graph import ProgramEditor
from spinpass.passes.untie import untie
from tests.support.decoders import Decoder, exported, made
from tests.support.passes import error


def test_untying_gives_every_use_its_own_constant() -> None:
    before = exported(made(Decoder(tied=True)))
    editor = ProgramEditor(before)
    table = next(
        n for n in editor.nodes if editor.is_stored(n) and len(n.users) == 2 and "embed.weight" in editor.fqns(n)
    )
    copies = untie(editor, [table])
    assert len(copies) == 1 and len(table.users) == len(copies[0].users) == 1
    editor.queue(copies[0], lambda t: t * 1.0)
    after = editor.finish()
    assert error(before, after) == 0
    assert after.state_dict.keys() == before.state_dict.keys()
    again = ProgramEditor(after)
    assert untie(again, [n for n in again.nodes if again.is_stored(n) and n.users]) == []

"""What an edit breaks is seen, by whatever route it was made, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from spinpass.errors import InvariantError
from spinpass.graph import Invariants, ProgramEditor, listing, op_name
from tests.support.decoders import exported

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu() + 1.0  # type: ignore[no-any-return]


@pytest.fixture
def editor() -> ProgramEditor:
    return ProgramEditor(exported(Small().eval(), (torch.zeros(2, 4),)))


def named(editor: ProgramEditor, name: str) -> torch.fx.Node:
    return next(n for n in editor.nodes if n.name == name)


def test_nothing_has_changed(editor: ProgramEditor) -> None:
    invariants = Invariants(editor)
    changes = invariants.check()
    assert not changes.graph and not changes.queued


def test_what_changed_is_listed_once(editor: ProgramEditor) -> None:
    invariants = Invariants(editor)
    relu = named(editor, "relu")
    negated = editor.call(aten.neg.default, relu, after=relu, origin="test")
    editor.replace(relu, negated)
    editor.queue(named(editor, "p_linear_weight"), lambda tensor: -tensor)
    editor.queue(named(editor, "p_linear_weight"), lambda tensor: -tensor)
    changes = invariants.check()
    assert changes.made == (negated,) and changes.altered == (named(editor, "add"),) and changes.removed == 0
    assert changes.queued == {named(editor, "p_linear_weight"): 2}
    assert not invariants.check().graph
    editor.replace(negated, relu)
    editor.erase([negated])
    assert invariants.check().removed == 1


def rewired(editor: ProgramEditor) -> None:
    """The sum reads what is computed after it."""
    add = named(editor, "add")
    later = editor.call(aten.neg.default, add, after=add, origin="test")
    add.replace_input_with(named(editor, "relu"), later)


def foreign(editor: ProgramEditor) -> None:
    other = ProgramEditor(exported(Small().eval(), (torch.zeros(2, 4),)))
    named(editor, "add").args = (named(other, "relu"), 1.0)


def wider(editor: ProgramEditor) -> None:
    relu = named(editor, "relu")
    doubled = editor.call(aten.cat.default, [relu, relu], -1, after=relu, origin="test")
    editor.replace(relu, doubled, [named(editor, "add")])


def cast(editor: ProgramEditor) -> None:
    relu = named(editor, "relu")
    editor.replace(relu, editor.call(aten.to.dtype, relu, torch.float64, after=relu, origin="test"))


def unrecorded(editor: ProgramEditor) -> None:
    relu = named(editor, "relu")
    made = editor.call(aten.neg.default, relu, after=relu, origin="test")
    editor.replace(relu, made)
    del made.meta["val"]


def another_output(editor: ProgramEditor) -> None:
    add = named(editor, "add")
    flat = editor.call(aten.flatten.using_ints, add, after=add, origin="test")
    editor.output_node.args = ((flat,),)


def fewer_outputs(editor: ProgramEditor) -> None:
    editor.output_node.args = ((),)


def another_kind(editor: ProgramEditor) -> None:
    editor.inputs.pop()


def moved(editor: ProgramEditor) -> None:
    """The product is computed after the relu that reads it; no node's arguments are touched."""
    named(editor, "relu").append(named(editor, "linear"))


def another_function(editor: ProgramEditor) -> None:
    named(editor, "relu").target = aten.neg.default


def in_place(editor: ProgramEditor) -> None:
    relu = named(editor, "relu")
    editor.replace(relu, editor.call(aten.mul_.Scalar, relu, 1.0, after=relu, origin="test"))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (moved, "relu reads linear, which is computed after it"),
        (another_function, "relu computes aten.neg.default, not aten.relu.default as before"),
        (in_place, "mul__scalar writes into relu: the graph is functional"),
        (rewired, "add reads neg_default, which is computed after it"),
        (foreign, "add reads relu, which is not in the graph"),
        (wider, r"add reads cat_default, float32\[2, 8\], in place of relu, float32\[2, 4\], and its recorded value was not made"),
        (cast, r"add reads to_dtype, float64\[2, 4\], in place of relu, float32\[2, 4\]"),
        (unrecorded, "neg_default has no recorded value"),
        (another_output, "the program returns something else than before: .*8.*, not .*2, 4"),
        (fewer_outputs, "the program returns something else than before"),
        (another_kind, "the program takes something else than before"),
    ],
)
def test_what_an_edit_breaks_is_named(editor: ProgramEditor, edit: Callable[[ProgramEditor], None], text: str) -> None:
    invariants = Invariants(editor)
    edit(editor)
    with pytest.raises(InvariantError, match=text):
        invariants.check()


class Checked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[0] > 1)
        return x.nonzero().float()


def test_a_check_that_is_gone_is_named() -> None:
    editor = ProgramEditor(torch.export.export(Checked(), (torch.ones(2, 4),)))
    checks = [n for n in editor.nodes if "assert" in op_name(n)]
    invariants = Invariants(editor)
    editor.erase(checks[-1:])
    with pytest.raises(InvariantError, match="a check of what the program is given, is gone"):
        invariants.check()


def test_a_listing_shows_constants_and_nodes(editor: ProgramEditor) -> None:
    relu = named(editor, "relu")
    editor.replace(relu, editor.call(aten.neg.default, relu, after=relu, origin="R9:test"))
    editor.queue(named(editor, "p_linear_weight"), lambda tensor: -tensor)
    lines = listing(editor).splitlines()
    assert "constant p_linear_weight  linear.weight: float32[4, 4], 1 step queued" in lines
    assert "neg_default = aten.neg.default(relu): float32[2, 4]  # R9:test" in lines
    assert lines[-1].startswith("output = output([add])")
    assert sum(op_name(n) == "aten::neg" for n in editor.nodes) == 1

"""A pass that breaks the program is named with the space it broke it for; dumps show what every pass did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import spinpass
from spinpass import pipeline
from spinpass.analysis import Space
from spinpass.errors import ConfigError, InvariantError, ProgramError
from spinpass.graph import ProgramEditor, op_name
from spinpass.passes import PassRunner, SitePass, center, fold, functionalize, fuse_norm_scale, insert_rotations
from tests.support.decoders import Decoder, exported, made

aten = torch.ops.aten
Edit = Callable[[ProgramEditor, Space], None]


def program(**shape: Any) -> torch.export.ExportedProgram:
    return exported(made(Decoder(**{"norm": "ln", "bias": True} | shape)))


def spoiled(name: str, edit: Edit) -> list[SitePass]:
    """The passes, one of which does ``edit`` as well."""

    def also(each: SitePass) -> SitePass:
        def run(editor: ProgramEditor, space: Space, *more: Any) -> Space:
            result = each.run(editor, space, *more)
            edit(editor, space)
            return result

        return replace(each, run=run)

    return [also(p) if p.name == name else p for p in pipeline.PASSES]


def one_step_more(editor: ProgramEditor, space: Space) -> None:
    editor.queue(editor.current(space.constants[0].node), lambda tensor: tensor)


def a_node_more(editor: ProgramEditor, space: Space) -> None:
    node = next(n for n in editor.nodes if op_name(n) == "aten::embedding")
    editor.replace(node, editor.call(aten.neg.default, node, after=node, origin="test"))


def two_outputs(editor: ProgramEditor, space: Space) -> None:
    returned = editor.output_node.args[0]
    editor.output_node.args = ((*returned, *returned),)  # type: ignore[misc]


def a_cast(editor: ProgramEditor, space: Space) -> None:
    node = next(n for n in editor.nodes if op_name(n) == "aten::embedding")
    editor.replace(node, editor.call(aten.to.dtype, node, torch.float32, after=node, origin="test"))


def raises(editor: ProgramEditor, space: Space) -> None:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("name", "edit", "text"),
    [
        ("FoldRotations", one_step_more, "FoldRotations broke the program at R1:residual: .* was folded 2 times, not 1"),
        ("FoldRotations", a_node_more, "FoldRotations broke the program at R1:residual: the graph is another one"),
        ("Center", two_outputs, "Center broke the program at R1:residual: the program returns something else than before"),
        ("FuseNormScale", a_cast, r"FuseNormScale broke the program at R1:residual: .* reads .*, float32\[2, 5, 24\], in place"),
        ("InsertRotations", raises, "InsertRotations failed at R3:blocks.0.attn: IndexError: list index out of range"),
    ],
)  # fmt: skip
def test_the_pass_and_the_space_are_named(name: str, edit: Edit, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = program()
    monkeypatch.setattr(pipeline, "PASSES", spoiled(name, edit))
    for run in (spinpass.plan, spinpass.transform):
        with pytest.raises(InvariantError, match=text) as caught:
            run(source)
        assert caught.value.__cause__ is not None


def fails(editor: ProgramEditor, space: Space) -> None:
    def step(tensor: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("division by zero")

    editor.queue(editor.current(space.constants[0].node), step)


def flattens(editor: ProgramEditor, space: Space) -> None:
    editor.queue(editor.current(space.constants[0].node), lambda tensor: tensor.flatten())


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (fails, "what FoldRotations at R1:residual has queued fails: ZeroDivisionError: division by zero"),
        (flattens, r"what FoldRotations at R1:residual has queued changes a shape from \(40, 24\) to \(960,\)"),
    ],
)
def test_a_step_that_fails_later_names_its_pass(edit: Edit, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", spoiled("FoldRotations", edit))
    monkeypatch.setattr(PassRunner, "_check", lambda *_: None)
    with pytest.raises(InvariantError, match=text):
        spinpass.transform(program())


def two_for_one(editor: ProgramEditor) -> None:
    editor.output_node.args = ((*editor.output_node.args[0], *editor.output_node.args[0]),)  # type: ignore[misc]
    editor.outputs.append(editor.outputs[0])


def renamed(editor: ProgramEditor) -> None:
    node = editor.user_inputs()[0]
    next(spec for spec in editor.inputs if spec.arg.name == node.name).arg.name = node.name = "other"


@pytest.mark.parametrize(
    ("edit", "text"), [(two_for_one, "it returns 2 values in place of 1"), (renamed, "it takes other")]
)
def test_opening_a_program_keeps_its_interface(
    edit: Callable[[ProgramEditor], None], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(source: torch.export.ExportedProgram) -> ProgramEditor:
        editor = functionalize.open_program(source)
        edit(editor)
        return editor

    monkeypatch.setattr("spinpass.passes.runner.open_program", opened)
    with pytest.raises(InvariantError, match=f"Functionalize broke the program at the whole program: {text}"):
        spinpass.plan(program())


def test_a_program_without_recorded_values_is_the_users() -> None:
    source = program()
    next(n for n in source.graph.nodes if op_name(n) == "aten::linear").meta.pop("val")
    with pytest.raises(ProgramError, match="has no recorded value: take a program as torch.export made it"):
        spinpass.plan(source)


def nothing(*args: Any, **options: Any) -> None:
    return None


def twice(real: Any) -> Any:
    def rotate_value(editor: Any, node: Any, *args: Any, **options: Any) -> Any:
        return real(editor, real(editor, node, *args, **options), *args, **options)

    return rotate_value


def past(real: Any) -> Any:
    """The rotation is inserted and nobody reads it."""

    def rotate_value(editor: Any, node: Any, *args: Any, **options: Any) -> Any:
        real(editor, node, *args, **options)
        return node

    return rotate_value


def inverted(real: Any) -> Any:
    def rotate_value(*args: Any, inverse: bool = False, dual: bool = False) -> Any:
        return real(*args, inverse=not inverse, dual=dual)

    return rotate_value


@pytest.mark.parametrize("kind", ["random-hadamard", "random-matrix"])
@pytest.mark.parametrize(("change", "text"), [
    (twice, "InsertRotations broke the program at R3:.*: 4 rotations and 0 inverses were inserted, not 2 and 0"),
    (inverted, "InsertRotations broke the program at R3:.*: 0 rotations and 2 inverses were inserted, not 2 and 0"),
    (past, "InsertRotations broke the program at R3:.*: .* still reads .* in the original basis"),
])  # fmt: skip
def test_online_rotations_are_counted(kind: Any, change: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insert_rotations, "rotate_value", change(insert_rotations.rotate_value))
    with pytest.raises(InvariantError, match=text):
        spinpass.plan(program(), spinpass.RotationConfig(rotations=("R3",), kind=kind))


def test_an_exit_that_is_read_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insert_rotations, "rotate_value", past(insert_rotations.rotate_value))
    with pytest.raises(InvariantError, match="InsertRotations broke the program at R1:residual: .* (in the|still reads)"):
        spinpass.plan(program(norm="rms", tied=True), spinpass.RotationConfig(form="offline", tied="keep"))


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        (fuse_norm_scale, "_scale", "FuseNormScale broke the program at R1:residual: .* did not take over the scale "),
        (fuse_norm_scale, "_unscale", "FuseNormScale broke the program at R1:residual: .* still applies a scale"),
        (fuse_norm_scale, "_shift_result", "FuseNormScale broke the program at R1:residual: no bias of .* took over"),
        (center, "_stop_centring", "Center broke the program at R1:residual: .* still centres"),
        (fold, "rotate_constant", "FoldRotations broke the program at R1:residual: .* was folded 0 times, not 1"),
    ],
)
def test_what_a_pass_forgets_is_named(module: Any, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, nothing)
    with pytest.raises(InvariantError, match=text):
        spinpass.plan(program(bias=False))


def test_a_writer_that_is_not_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ProgramEditor.queue
    monkeypatch.setattr(ProgramEditor, "queue", lambda self, node, *step: None if "embed" in node.name else real(self, node, *step))
    with pytest.raises(InvariantError, match="Center broke the program at R1:residual: embed.weight writes into the stream"):
        spinpass.plan(program())


def test_a_table_that_stays_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spinpass.passes.runner.untie", nothing)
    with pytest.raises(InvariantError, match=r"Untie broke the program at .*: .* is still read by .*, .*"):
        spinpass.plan(program(norm="rms", tied=True), spinpass.RotationConfig(tied="untie"))


def test_what_functionalization_runs_into_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functionalize, "functionalize", lambda editor: 1 / 0)
    with pytest.raises(InvariantError, match="Functionalize failed at the whole program: ZeroDivisionError"):
        PassRunner(program())


def test_a_pass_without_work_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(each: SitePass) -> SitePass:
        def run(*args: Any) -> Space:
            calls.append(each.name)
            return each.run(*args)

        return replace(each, run=run)

    monkeypatch.setattr(pipeline, "PASSES", [counted(p) for p in pipeline.PASSES])
    spinpass.plan(program(norm="rms", bias=False), spinpass.RotationConfig(rotations=("R2",)))
    assert calls == ["FoldRotations"]


def test_dumps_of_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINPASS_DUMP", str(tmp_path / "dumps"))
    source = program(tied=True)
    spinpass.plan(source, spinpass.RotationConfig(tied="untie"))
    spinpass.plan(source, spinpass.RotationConfig(rotations=("R2",)))
    assert sorted(p.name for p in (tmp_path / "dumps").iterdir()) == ["run-1", "run-2"]
    first = {p.name: p.read_text() for p in sorted((tmp_path / "dumps" / "run-1").iterdir())}
    assert list(first)[:2] == ["0001-the_whole_program-Functionalize.after.txt", "0001-the_whole_program-Functionalize.before.txt"]
    passes = {name.rsplit("-", 1)[1].split(".")[0] for name in first}
    assert passes == {"Functionalize", "Untie", "FuseNormScale", "Center", "InsertRotations", "FoldRotations"}
    assert all(name.replace("after", "before") in first for name in first)
    (before,) = (t for n, t in first.items() if n.endswith("R3_blocks.0.attn-InsertRotations.before.txt"))
    (after,) = (t for n, t in first.items() if n.endswith("R3_blocks.0.attn-InsertRotations.after.txt"))
    assert before.count("spinpass.hadamard") + 2 == after.count("spinpass.hadamard") and "# R3:blocks.0.attn" in after


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("SPINPASS_DUMP", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="which SPINPASS_DUMP asks for, cannot be written: No space left on device"):
        spinpass.plan(program())


def test_dumps_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for wanted in (file, file / "below"):
        monkeypatch.setenv("SPINPASS_DUMP", str(wanted))
        with pytest.raises(ConfigError, match="SPINPASS_DUMP=.*: .*: name another folder|: name a folder that can be"):
            spinpass.plan(program())

"""One pass on one space of a tiny decoder, its residual stream, and what the tests of all passes ask of the result."""

from __future__ import annotations

from collections.abc import Callable

from torch.export import ExportedProgram

from spinpass.analysis import Space, Walk, find_residual_sums, whole_axis
from spinpass.execution import run
from spinpass.graph import ProgramEditor, op_name, shape
from spinpass.passes.center import center
from spinpass.passes.fuse_norm_scale import fuse_norm_scale
from tests.support.decoders import relative_error, tokens


def stream(editor: ProgramEditor) -> Space:
    node = next(iter(n for n in find_residual_sums(editor) if shape(n)[-1] == 24))
    return Walk(editor).grow(node, whole_axis(node, 2))


def finished(
    editor: ProgramEditor, space: Space, *passes: Callable[[ProgramEditor, Space], Space]
) -> tuple[ExportedProgram, Space]:
    for one in passes:
        space = one(editor, space)
    return editor.finish(), space


def fuse(editor: ProgramEditor, space: Space) -> Space:
    return fuse_norm_scale(editor, space, "R1:residual")


def centred(editor: ProgramEditor, space: Space) -> Space:
    return center(editor, space, "R1:residual")


def error(before: ExportedProgram, after: ExportedProgram) -> float:
    return relative_error(run(before, (tokens(),), float64=True), run(after, (tokens(),), float64=True))


def targets(program: ExportedProgram, word: str) -> int:
    return sum(word in op_name(n) for n in program.graph.nodes)

"""``linear(x, W), linear(y, W) -> linear(x, W), linear(y, W')``, W' = W: a stored constant for every linear layer.

XNNPACK's partitioner (ExecuTorch 1.5) joins two layers that read one constant into one delegate even where a part that
is not delegated lies between them, and fails on the cycle. A file holds equal weights once all the same.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.export import ExportedProgram

from spinpass import record
from spinpass.execution import constants
from spinpass.graph import ProgramEditor, op_name


def give_own_constants(program: ExportedProgram, but: Collection[str] = ()) -> ExportedProgram:
    """Return a program in which no two linear layers read one constant, except those constants named in ``but``.

    The record (:mod:`spinpass.record`) is kept. The program given is not changed; it is returned where no linear
    layers share a constant.

    Raises:
        ProgramError, QuantizedWeightError: as :class:`spinpass.graph.editor.ProgramEditor`.
    """
    editor = ProgramEditor(program)
    known = constants(program)
    shared = False
    for node in [n for n in editor.nodes if editor.is_stored(n) and editor.fqn(n) not in but]:
        for reader in [user for user in node.users if op_name(user) == "aten::linear"][1:]:
            # a clone: editors take what is stored as one tensor for one constant
            editor.replace(node, editor.add_constant(editor.fqn(node), known[node.name].detach().clone()), [reader])
            shared = True
    if not shared:
        return program
    found = record.read(program)
    if found is not None:
        record.write(editor.graph, found)
    return editor.finish()

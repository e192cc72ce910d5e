"""ReturnStates:  x.copy_(y); return x  ->  return y:  what is written into an input is returned, and the input is left.

Recurrent states and those of convolutions are updated where they lie. A file keeps nothing between calls: each takes
the states and returns the next ones. The caller's tensors are then no longer written to; what is returned is the same.
"""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from spinpass.errors import ExportError
from spinpass.graph import mutates, op_name

from .functionalize import open_program


def return_states(program: ExportedProgram) -> ExportedProgram:
    """Return the program without writes to its inputs; the program itself where it has none.

    Raises:
        ExportError: something is written to an input and not returned.
        ProgramError, QuantizedWeightError: as :class:`spinpass.graph.editor.ProgramEditor`.
    """
    if not any(mutates(node) and op_name(node) != "aten::detach_" for node in program.graph.nodes):
        return program
    editor = open_program(program)
    written = {i: (target, node) for i, kind, target, node in editor.output_values() if _is_write(kind)}
    if not written:
        return program
    returned = {node for _, kind, _, node in editor.output_values() if kind is OutputKind.USER_OUTPUT}
    for target, node in written.values():
        if node not in returned:
            raise ExportError(
                f"the program writes to its input {target} and does not return it, so that a file would lose it: "
                "export the program with that state among its outputs"
            )
    editor.outputs = [spec for spec in editor.outputs if not _is_write(spec.kind)]
    values = editor.output_node.args[0]
    editor.output_node.args = (tuple(v for i, v in enumerate(values) if i not in written),)  # type: ignore[arg-type]
    return editor.finish()


def _is_write(kind: OutputKind) -> bool:
    return kind is OutputKind.USER_INPUT_MUTATION

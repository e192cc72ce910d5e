"""``spinpass::op(x)  ->  aten`` operators:  a program that needs nothing of spinpass where it runs.

    hadamard       ->  linear layers of Kronecker factors (:mod:`.lower_hadamards`), equal to float rounding
    round_*        ->  its own arithmetic, equal bit for bit
    packed_linear  ->  shifts and masks of the same codes, (q − z)·s, linear, equal bit for bit

What an operator computes is not written a second time: its formula (:mod:`spinpass.operators.formulas`) is traced on
the values that export recorded, and the trace takes its place in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from spinpass import record
from spinpass.errors import ExportError, ProgramError
from spinpass.graph import (
    ProgramEditor,
    arguments,
    functional_target,
    integers_as_buffers,
    integers_as_parameters,
    mutates,
    op_name,
    value,
    with_constants,
)
from spinpass.operators import FORMULAS

from .lower_hadamards import put_in_place, replace_hadamards


def lower(program: ExportedProgram) -> ExportedProgram:
    """Return a program that computes what ``program`` does with operators of torch (``aten::``) alone.

    It is for takers that have no Python, or have not imported spinpass: AOTInductor, ExecuTorch, other compilers and
    readers of ``torch.export`` programs. Signature, dynamic shapes, constants and the record (:mod:`spinpass.record`)
    are kept. Hadamards become linear layers, whose factors are new parameters, and are equal to float rounding;
    roundings and packed linear layers are equal bit for bit. The codes of a packed layer stay the integers that they
    are: its weight is computed anew at each call. Gradients are not those of the operators, which pass straight through
    roundings.

    Args:
        program: any program, rotated or quantized or packed. It is not changed.

    Returns:
        A new program, whose constants are not copies. Without operators of spinpass it is an equal one.

    Raises:
        ProgramError, QuantizedWeightError: as :func:`spinpass.rotate`, but packed programs of spinpass are taken.
        ExportError: a Hadamard runs along an axis of dynamic size, or an operator lies where a pass does not reach.
    """
    if not isinstance(program, ExportedProgram):
        raise ProgramError(f"lower takes a torch.export.ExportedProgram, got {type(program).__name__}")
    if not _own_operators(program):
        return with_constants(program, program.state_dict)
    integers = {name for name, tensor in program.state_dict.items() if _is_integer_parameter(tensor)}
    editor = ProgramEditor(integers_as_buffers(program))
    replace_hadamards(editor)
    for node in [n for n in editor.nodes if op_name(n) in FORMULAS]:
        put_in_place(editor, node, _written_out(editor, node))
    found = record.read(program)
    if found is not None:
        record.write(editor.graph, found)
    result = integers_as_parameters(editor.finish(), integers)
    _check_operators(result)
    return result


def _is_integer_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())


def _written_out(editor: ProgramEditor, node: Node) -> Node:
    """Return the last of the nodes that compute what ``node`` does; they stand behind it."""
    given = arguments(node)
    operands = [name for name, argument in given.items() if isinstance(argument, Node)]

    def formula(*tensors: Tensor) -> Tensor:
        return FORMULAS[op_name(node)](**given | dict(zip(operands, tensors, strict=True)))

    with editor.fake_mode(), torch.no_grad():
        traced: Graph = make_fx(formula, pre_dispatch=True)(*(value(given[name]) for name in operands)).graph
    inputs = (given[name] for name in operands)
    made: dict[Node, Any] = {}
    last = node
    for step in traced.nodes:
        if step.op == "placeholder":
            made[step] = next(inputs)
        elif step.op == "output":
            return made[step.args[0]]  # type: ignore[no-any-return]
        else:
            target = functional_target(step) if mutates(step) else step.target  # what is written to is no one else's
            args, kwargs = map_arg((step.args, step.kwargs), made.__getitem__)
            made[step] = last = editor.call(target, *args, after=last, origin=_origin(node), **kwargs)
    raise AssertionError("a graph ends with its output")


def _origin(node: Node) -> str:
    return str(node.meta.get("custom", {}).get("spinpass_origin") or node.name)


def _own_operators(program: ExportedProgram) -> list[str]:
    """Return the names of the operators of spinpass that the program calls, in the branches of its graph too."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sorted({op_name(n) for graph in graphs for n in graph.nodes if op_name(n).startswith("spinpass::")})


def _check_operators(program: ExportedProgram) -> None:
    if left := _own_operators(program):
        raise ExportError(
            f"{', '.join(left)} cannot be written in operators of torch here: lower takes what is in the graph itself, "
            "not in the branches of a control flow operator"
        )

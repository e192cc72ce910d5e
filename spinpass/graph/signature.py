"""Programs with other constants: without some, with others in their place, integers as parameters or as buffers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from torch.nn import Parameter


def without_constants(program: ExportedProgram, names: Collection[str]) -> ExportedProgram:
    """Return the program without constants that no operator reads, and without their placeholders.

    The program given is used up.
    """
    dropped = {s.arg.name for s in program.graph_signature.input_specs if s.target in names}
    for node in [n for n in program.graph.nodes if n.op == "placeholder" and n.name in dropped]:
        program.graph.erase_node(node)
    specs = [s for s in program.graph_signature.input_specs if s.arg.name not in dropped]
    state = {name: t for name, t in program.state_dict.items() if name not in names}
    return with_constants(program, state, specs)


def with_constants(
    program: ExportedProgram, state_dict: Mapping[str, Tensor], specs: list[InputSpec] | None = None
) -> ExportedProgram:
    """Return a copy of the program with another state dict, and with other input specs if any are given."""
    signature = program.graph_signature
    return ExportedProgram(
        root=program.graph_module,
        graph=copy.deepcopy(program.graph),
        graph_signature=ExportGraphSignature(
            input_specs=copy.deepcopy(signature.input_specs) if specs is None else specs,
            output_specs=copy.deepcopy(signature.output_specs),
        ),
        state_dict=dict(state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def with_other_values(program: ExportedProgram, values: Mapping[str, Tensor]) -> ExportedProgram:
    """Return a copy of the program whose parameters and buffers of these names have these values."""
    state: dict[str, Tensor] = {}
    for name, tensor in program.state_dict.items():
        new = values.get(name, tensor)
        state[name] = Parameter(new, requires_grad=False) if isinstance(tensor, Parameter) else new
    return with_constants(program, state)


def integers_as_buffers(program: ExportedProgram) -> ExportedProgram:
    """Return the program with integer parameters as buffers, so that :class:`.editor.ProgramEditor` takes it."""
    state, specs = dict(program.state_dict), copy.deepcopy(program.graph_signature.input_specs)
    for spec in specs:
        if spec.kind == InputKind.PARAMETER and spec.target is not None:
            tensor = state[spec.target]
            if not tensor.is_floating_point():
                spec.kind, spec.persistent, state[spec.target] = InputKind.BUFFER, True, tensor.detach()
    return with_constants(program, state, specs)


def integers_as_parameters(program: ExportedProgram, names: Collection[str]) -> ExportedProgram:
    """Return the program with the buffers of these names as parameters: the inverse of :func:`integers_as_buffers`."""
    state, specs = dict(program.state_dict), copy.deepcopy(program.graph_signature.input_specs)
    for spec in specs:
        if spec.kind == InputKind.BUFFER and spec.target in names:
            spec.kind, spec.persistent = InputKind.PARAMETER, None
            state[spec.target] = torch.nn.Parameter(state[spec.target], requires_grad=False)
    return with_constants(program, state, specs)

"""Where a program computes:  a name  ->  a device,  a program  ->  the same program there.

A program lives where its constants do: what runs it, folds it or rounds it makes its tensors there, and asks for no
device of its own. A constant that is held in memory is held by the device. One that is read when it is used stays where
it is, and what is read of it is moved.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_map_only

from spinpass.errors import ConfigError

from .editor import copied_graph
from .handles import Handle, storage_key
from .nodes import is_context
from .sources import moved

HOST = torch.device("cpu")
"""Where files are read and written, and codes are kept."""

Device = str | torch.device
_NAMES = re.compile(r"cpu|cuda(?::(0|[1-9]\d*))?")
_TYPES = ("cpu", "cuda")


def named_device(name: Device) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, which is the current one of them, or ``cuda:N``.

    Raises ConfigError where it is no such name, or there is no such device here.
    """
    named = _NAMES.fullmatch(str(name))
    if named is None:
        raise ConfigError(f"device {str(name)!r} is not one of cpu, cuda, cuda:N: choose one of them")
    if str(name) == "cpu":
        return HOST
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {name}: torch {torch.__version__} finds no CUDA device here: choose cpu, or install a build of "
            "torch for CUDA where there is one"
        )
    index, count = named[1], torch.cuda.device_count()
    if index is not None and int(index) >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"device {name}: torch finds {there} here: choose cpu or one of these")
    return torch.device("cuda", torch.cuda.current_device() if index is None else int(index))


def device_of(program: ExportedProgram) -> torch.device:
    """Return where a program lives: the device of its constants, that of its inputs where it has none."""
    held = [*program.state_dict.values(), *program.constants.values()]
    held += [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    return next((each.device for each in held if isinstance(each, Tensor)), HOST)


def on_device(program: ExportedProgram, device: Device) -> ExportedProgram:
    """Return a program that computes what ``program`` does, on a device.

    Its constants and example inputs are moved there, and what its graph makes is made there. Constants that are read
    when they are used are moved when they are read. Constants that are tied stay tied.

    Args:
        program: it is not changed, and returned as it is where it lives on the device.
        device: ``cpu``, ``cuda``, ``cuda:N`` or a device of torch.

    Raises:
        ConfigError: there is no such device.
    """
    there = named_device(device)
    if there == device_of(program):
        return program
    made: dict[tuple[Any, ...], Tensor] = {}
    signature = copy.deepcopy(program.graph_signature)
    graph = _moved_graph(program.graph, there)
    parts = {str(n.target): getattr(program.graph_module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    module = GraphModule({name: _moved_part(part, there) for name, part in parts.items()}, graph)
    module.meta.update(program.graph_module.meta)
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=ExportGraphSignature(signature.input_specs, signature.output_specs),
        state_dict={name: _moved(tensor, there, made) for name, tensor in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=tree_map_only(Tensor, lambda tensor: tensor.to(there), program.example_inputs),
        constants={name: _moved(each, there, made) for name, each in program.constants.items()},
        verifiers=program.verifiers,
    )


def placed(arguments: Any, device: torch.device) -> Any:
    """Return the arguments of a call with ``device`` in place of every device that they name."""
    return tree_map_only(torch.device, lambda _: device, arguments)


def _moved(value: Any, device: torch.device, made: dict[tuple[Any, ...], Tensor]) -> Any:
    """Return a constant on a device, the same for all names of one."""
    if not isinstance(value, Tensor):
        return value
    key = storage_key(value)
    if key not in made:
        held = value.detach()
        if isinstance(held, Handle):
            made[key] = Handle(moved(held.source, device), held.turned)
        else:
            made[key] = held.to(device)
    wrap = isinstance(value, torch.nn.Parameter)
    return torch.nn.Parameter(made[key], requires_grad=value.requires_grad) if wrap else made[key]


def _moved_part(part: Any, device: torch.device) -> Any:
    """Return what a graph gets as an attribute: the graph of a region, with what that gets, or a tensor."""
    if isinstance(part, Tensor):
        return part.to(device)
    if not isinstance(part, GraphModule):
        return part
    graph = _moved_graph(part.graph, device)
    inner = {str(n.target): getattr(part, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    return GraphModule({name: _moved_part(each, device) for name, each in inner.items()}, graph)


def _moved_graph(graph: Graph, device: torch.device) -> Graph:
    """Return a copy of a graph that names a device wherever it names one, in what was recorded as well."""
    made = copied_graph(graph)
    for node in made.nodes:
        node.args, node.kwargs = placed(node.args, device), placed(dict(node.kwargs), device)
        if is_context(node):  # autocast names the type of a device
            node.args = tuple(device.type if arg in _TYPES else arg for arg in node.args)
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, lambda val: _recorded(val, device), node.meta["val"])
    return made


def _recorded(val: Tensor, device: torch.device) -> Tensor:
    """Return a recorded value as one of a device."""
    if not isinstance(val, torch._subclasses.FakeTensor):
        return val.to(device)
    with val.fake_mode:
        return val.to(device)

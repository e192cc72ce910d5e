"""Names that say where in the model a thing is: nodes and constants by their module, axes by what they count.

    node_linear_7            ->   /model/layers.1/self_attn/q_proj/MatMul
    val_220 (a transpose)    ->   model.layers.1.self_attn.q_proj.MatMul.weight
    s36 + s70                ->   total_sequence_length

torch leaves in each node the path of the module that it was traced in. What has none, because it was made since, is
named after what reads it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir
from torch.export import ExportedProgram

from spinpass.execution import InputRole, UserInput, returned_state, token_input, user_inputs

SCOPES = "pkg.torch.onnx.name_scopes"
"""The key of a node's metadata under which torch leaves the modules around it, and last the node's own name."""

_WORD = re.compile(r"[A-Za-z_]\w*")
_BATCH, _NEW, _PAST, _ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def name_by_module(model: ir.Model, parameters: Collection[str]) -> None:
    """Name the nodes of the graph, their results, and the constants that have no name of their own, in place.

    Inputs, outputs and ``parameters``, the names that the program gives its own constants, stay.
    """
    graph = model.graph
    paths = _paths(graph)
    counts: Counter[str] = Counter()
    for node in graph:
        base = f"{paths[node]}/{node.op_type}"
        node.name = base if not counts[base] else f"{base}_{counts[base]}"
        counts[base] += 1
        for i, result in enumerate(node.outputs):
            if not result.is_graph_output():
                result.name = f"{node.name}/output_{i}"
    for constant in list(graph.initializers.values()):
        if re.fullmatch(r"[a-z]\w*", str(constant.name)) and constant.name not in parameters:
            _name_constant(graph, constant)


def _name_constant(graph: ir.Graph, constant: ir.Value) -> None:
    use = next(iter(constant.uses()), None)
    if use is None:
        return
    base = name = f"{use.node.name}/constant_{use.idx}"
    count = 0
    while name in graph.initializers:
        count += 1
        name = f"{base}_{count}"
    _rename(graph, constant, name)


def _rename(graph: ir.Graph, constant: ir.Value, name: str) -> None:
    del graph.initializers[str(constant.name)]
    constant.name = name
    if constant.const_value is not None:
        constant.const_value.name = name
    graph.register_initializer(constant)


# -- paths of modules --------------------------------------------------------------------------------------------------


def _paths(graph: ir.Graph) -> dict[ir.Node, str]:
    """Return the path of the module of every node; of one that has none, that of the node that reads it."""
    paths: dict[ir.Node, str] = {}
    for node in reversed(graph):
        scopes = _scopes(node)
        readers = [] if scopes else [user for result in node.outputs for user in result.consumers() if user in paths]
        paths[node] = _path(scopes) if scopes else paths[readers[0]] if readers else ""
    return paths


def _scopes(node: ir.Node) -> list[str]:
    """Return the modules around a node, the outermost first."""
    text = node.metadata_props.get(SCOPES)
    if not text:
        return []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in found[:-1] if scope and not str(scope).startswith("_empty_nn_module")]


def _path(scopes: Iterable[str]) -> str:
    """Return ``/model/layers.0/mlp`` of ``model``, ``model.layers.0``, ``model.layers.0.mlp``."""
    parts, before = [], ""
    for scope in scopes:
        parts.append(scope.removeprefix(f"{before}.") if before else scope)
        before = scope
    return "".join(f"/{part}" for part in parts)


# -- constants that folding makes --------------------------------------------------------------------------------------


def transposed_weights(graph: ir.Graph) -> dict[str, str]:
    """Return {name of a result: name of the parameter} for every Transpose of a parameter of the graph.

    Ask before constants are folded, and give the answer to :func:`name_transposed` afterwards.
    """
    return {
        str(node.outputs[0].name): str(node.inputs[0].name)
        for node in graph
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    }


def name_transposed(graph: ir.Graph, origins: Mapping[str, str]) -> None:
    """Name every folded Transpose after the parameter, in place: it is the weight of a MatMul, (in, out)."""
    for result, parameter in origins.items():
        constant = graph.initializers.get(result)
        module, _, last = parameter.rpartition(".")
        name = f"{module}.MatMul.{last}" if module else f"MatMul.{last}"
        if constant is not None and name not in graph.initializers:
            _rename(graph, constant, name)


# -- axes --------------------------------------------------------------------------------------------------------------


def name_axes(model: ir.Model, ep: ExportedProgram, names: Mapping[str, str]) -> None:
    """Name the dynamic axes of every value by what they count, in place.

    Args:
        model: the graph, whose sizes are the symbols of the program and expressions of them.
        ep: the program.
        names: {placeholder: name of the input in the graph}, for sizes that are neither of batch, tokens nor cache.
    """
    roles = _axis_names(ep, names)
    if not roles:
        return

    def renamed(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        text = _WORD.sub(lambda word: roles.get(word[0], word[0]), str(size.value))
        return _ALL if text in (f"{_PAST} + {_NEW}", f"{_NEW} + {_PAST}") else text

    graph = model.graph
    results = [result for node in graph for result in node.outputs]
    for value in dict.fromkeys((*graph.inputs, *results, *graph.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def _axis_names(ep: ExportedProgram, names: Mapping[str, str]) -> dict[str, str]:
    """Return {symbol: name}. Token ids are looked up in a table, and a cache grows along one axis."""
    inputs = user_inputs(ep)
    caches = set(returned_state(ep).values())
    ids = token_input(inputs)
    found: dict[str, str] = {}
    if ids is not None and len(ids.shape) == 2:
        _add(found, ids, 0, _BATCH)
        _add(found, ids, 1, _NEW)
    for spec in inputs:
        if spec.name in caches and len(spec.shape) > 2:
            _add(found, spec, 0, _BATCH)
            _add(found, spec, len(spec.shape) - 2, _PAST)
    for spec in inputs:
        for axis in range(len(spec.shape)):
            _add(
                found,
                spec,
                axis,
                _ALL if _is_mask(spec, axis) else f"{_identifier(names.get(spec.name, spec.name))}_{axis}",
            )
    return found


def _is_mask(spec: UserInput, axis: int) -> bool:
    return spec.role is InputRole.MASK and len(spec.shape) == 2 and axis == 1


def _add(found: dict[str, str], spec: UserInput, axis: int, name: str) -> None:
    size = spec.shape[axis]
    if getattr(size, "is_symbol", False):
        found.setdefault(str(size), name)


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)

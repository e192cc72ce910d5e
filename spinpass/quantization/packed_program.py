"""pack:  linear layers on the constants that integers stand for  ->  ``spinpass::packed_linear`` on those integers.

    y = x Wᵀ + b, W float (out, in)   ->   y = packed_linear(x, qweight, scales, qzeros, g_idx, b, bits)

The integers are parameters of an integer dtype, by which :func:`spinpass.transform` and :func:`.quantize` know a packed
program and refuse it; :func:`unpack`, which has to be called, is the way back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import ConfigError
from ..program import ProgramEditor, arguments, op_name, shape, value
from . import packed_linear  # registers the operators
from .grid import Codes
from .packing import pack as packed_words
from .quantize import Quantized
from .sites import WeightSite, weight_sites

aten = torch.ops.aten
_OPERATOR = "spinpass::packed_linear"
_PRODUCTS = {"aten::linear": ("input", "weight"), "aten::matmul": ("self", "other"), "aten::mm": ("self", "mat2")}
_TRANSPOSES = {"aten::t", "aten::transpose", "aten::permute", "aten::numpy_T"}


@dataclass(frozen=True)
class Packed:
    """A program on packed integers; ``kept``: by parameter name, why a quantized weight stayed a float constant."""

    program: ExportedProgram
    kept: Mapping[str, str]


def pack(quantized: Quantized) -> Packed:
    """Put the integers of a quantized program in place of the float constants that they stand for.

    Outputs are equal bit for bit where the layer is ``aten::linear`` on the stored weight; a product with a transposed
    one is summed in another order. Constants are called as in a GPTQ checkpoint: ``x.weight`` becomes ``x.qweight``,
    ``x.scales``, ``x.qzeros`` and, for groups of any columns, ``x.g_idx``.

    Raises ConfigError where no weight of the program can be packed.
    """
    editor = ProgramEditor(quantized.program)
    sites: dict[str, list[WeightSite]] = {}
    for site in weight_sites(editor)[0]:
        sites.setdefault(editor.fqn(site.weight), []).append(site)
    kept: dict[str, str] = {}
    dead: set[str] = set()
    for name, weight in quantized.report.weights.items():
        reason = _why_keep(editor, sites.get(name, []))
        if reason:
            kept[name] = reason
            continue
        dead.update(editor.fqns(sites[name][0].weight))
        constants = _add_integers(editor, name.removesuffix(".weight"), weight.codes)
        for site in sites[name]:
            x, bias = _operands(site)
            target = torch.ops.spinpass.packed_linear.default
            replace_product(editor, site.linear, target, x, *constants, bias, weight.codes.bits)
    if not dead:
        raise ConfigError("nothing to pack: " + "; ".join(f"{n}: {why}" for n, why in kept.items()))
    return Packed(without_constants(editor.finish(), dead), kept)


def unpack(program: ExportedProgram) -> ExportedProgram:
    """Dequantize the layers of a packed program: float weights ``x.weight`` in the dtype of the layer's input, which
    can be rotated and quantized again. Equal to the packed program bit for bit.

    Raises ConfigError: the program has no packed layer.
    """

    def product(editor: ProgramEditor, node: Node) -> tuple[Any, ...]:
        args = arguments(node)
        weight = made.get(args["qweight"]) or _add_weight(editor, program, args)
        made[args["qweight"]] = weight
        return aten.linear.default, args["x"], weight, args["bias"]

    made: dict[Node, Node] = {}
    return rewritten(program, product)


def rewritten(program: ExportedProgram, product: Callable[[ProgramEditor, Node], tuple[Any, ...]]) -> ExportedProgram:
    """Every packed layer replaced by the call (target, *arguments) that ``product`` makes of it; integers that nothing
    reads any more are gone.

    Raises ConfigError: the program has no packed layer.
    """
    editor = ProgramEditor(integers_as_buffers(program))
    layers = packed_layers(editor)
    if not layers:
        raise ConfigError("the program has no packed linear layer; quantize it and pack the result")
    read = {stored for node in layers for stored in _constants_behind(editor, node)}
    for node in layers:
        replace_product(editor, node, *product(editor, node))
    result = editor.finish()
    users = {n.name: len(n.users) for n in result.graph.nodes if n.op == "placeholder"}
    kept = {editor.fqn(n) for n in read if users[n.name]}
    return integers_as_parameters(without_constants(result, {editor.fqn(n) for n in read} - kept), kept)


def _constants_behind(editor: ProgramEditor, node: Node) -> set[Node]:
    """The stored constants that a node reads, or that a constant expression does that it reads."""
    constants = [source for source in node.all_input_nodes if editor.is_constant(source)]
    stored = {source for source in constants if editor.is_stored(source)}
    return stored.union(*(_constants_behind(editor, source) for source in constants))


def packed_layers(editor: ProgramEditor) -> list[Node]:
    """The packed linear layers, in graph order."""
    return [node for node in editor.nodes if is_packed(node)]


def is_packed(node: Node) -> bool:
    """The node is a packed linear layer."""
    return op_name(node) == _OPERATOR


def evaluated(editor: ProgramEditor, program: ExportedProgram, node: Node) -> Tensor:
    """The value of a stored constant of ``program``, or of an expression of them, in its own dtype."""
    if editor.is_stored(node):
        name = editor.fqn(node)
        stored: Tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
        return stored.detach()
    assert callable(node.target)
    args, kwargs = (map_arg(part, lambda n: evaluated(editor, program, n)) for part in (node.args, node.kwargs))
    with torch.no_grad():
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[arg-type]
    return result


def replace_product(editor: ProgramEditor, node: Node, target: Callable[..., Any], *args: Any) -> None:
    """``target(*args)`` instead of a layer, with the record that the layer may carry."""
    made = editor.call(target, *args, after=node, origin="quantization")
    made.meta["custom"] = {**node.meta.get("custom", {}), **made.meta["custom"]}
    editor.replace(node, made)


def _why_keep(editor: ProgramEditor, sites: list[WeightSite]) -> str:
    """Why a weight stays what it is; empty where it can be packed."""
    if not sites:
        return "no linear layer reads it"
    weight = sites[0].weight
    if len(shape(weight)) != 2:
        return f"its shape {list(shape(weight))} is that of several matrices"
    products = {site.linear for site in sites}
    for site in sites:
        if _operands(site) is None:
            return f"{site.linear.name} ({op_name(site.linear)}) is no product with the weight as it is stored"
    other = [reader for reader in _readers(weight) if reader not in products]
    return f"{other[0].name} reads it too" if other else ""


def _readers(node: Node) -> list[Node]:
    """Who reads a matrix, itself or transposed."""
    found: list[Node] = []
    for user in node.users:
        found += _readers(user) if op_name(user) in _TRANSPOSES else [user]
    return found


def _operands(site: WeightSite) -> Any:
    """(input, bias or None) of a layer that multiplies by the stored weight or its transpose; None for any other."""
    name, args = op_name(site.linear), arguments(site.linear)
    if name == "aten::addmm":
        plain = args["alpha"] == 1 == args["beta"] and len(shape(args["self"])) == 1
        x, weight, bias = (args["mat1"] if plain else None), args["mat2"], args["self"]
    elif name in _PRODUCTS:
        x, weight, bias = *(args[key] for key in _PRODUCTS[name]), args.get("bias")
    else:
        return None
    while op_name(weight) in _TRANSPOSES:
        weight = weight.all_input_nodes[0]
    return (x, bias) if weight is site.weight and x is site.operand else None


def _add_integers(editor: ProgramEditor, module: str, codes: Codes) -> tuple[Node | None, ...]:
    """(qweight, scales, qzeros, g_idx) as constants."""
    tensors = {
        "qweight": packed_words(codes.q.T, codes.bits, 0),
        "scales": codes.scales.T.contiguous(),
        "qzeros": packed_words(codes.zeros.T, codes.bits, 1),
        "g_idx": None if codes.index is None else codes.index.to(torch.int32),
    }
    return tuple(None if t is None else editor.add_constant(f"{module}.{part}", t) for part, t in tensors.items())


def _add_weight(editor: ProgramEditor, program: ExportedProgram, args: Mapping[str, Any]) -> Node:
    """The float weight of a packed layer as a constant."""
    weight = weight_of(editor, program, args)
    return editor.add_constant(weight_name(editor, args["qweight"]), weight.to(value(args["x"]).dtype))


def weight_of(editor: ProgramEditor, program: ExportedProgram, args: Mapping[str, Any]) -> Tensor:
    """What the weight of a packed layer stands for, (out, in) in the scales' dtype."""
    qweight, scales, qzeros = (evaluated(editor, program, args[key]) for key in ("qweight", "scales", "qzeros"))
    g_idx = None if args["g_idx"] is None else evaluated(editor, program, args["g_idx"])
    columns = shape(args["x"])[-1]
    assert isinstance(columns, int)  # that of a stored weight
    return packed_linear.dequantized(qweight, scales, qzeros, g_idx, args["bits"], columns)


def weight_name(editor: ProgramEditor, qweight: Node) -> str:
    """``x.weight`` for ``x.qweight``."""
    return editor.fqn(qweight).removesuffix(".qweight") + ".weight"


# -- programs with other constants ------------------------------------------------------------------------------------


def without_constants(program: ExportedProgram, names: Collection[str]) -> ExportedProgram:
    """Drop constants that no operator reads, placeholders and all. ``program`` is used up."""
    dropped = {s.arg.name for s in program.graph_signature.input_specs if s.target in names}
    for node in [n for n in program.graph.nodes if n.op == "placeholder" and n.name in dropped]:
        program.graph.erase_node(node)
    specs = [s for s in program.graph_signature.input_specs if s.arg.name not in dropped]
    state = {name: t for name, t in program.state_dict.items() if name not in names}
    return with_constants(program, state, specs)


def with_constants(
    program: ExportedProgram, state_dict: Mapping[str, Tensor], specs: list[InputSpec] | None = None
) -> ExportedProgram:
    """A copy with another state dict, and other input specs if any are given."""
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


def integers_as_buffers(program: ExportedProgram) -> ExportedProgram:
    """Integer parameters as buffers: a program that an editor takes."""
    state, specs = dict(program.state_dict), copy.deepcopy(program.graph_signature.input_specs)
    for spec in specs:
        if spec.kind == InputKind.PARAMETER and spec.target is not None:
            tensor = state[spec.target]
            if not tensor.is_floating_point():
                spec.kind, spec.persistent, state[spec.target] = InputKind.BUFFER, True, tensor.detach()
    return with_constants(program, state, specs)


def integers_as_parameters(program: ExportedProgram, names: Collection[str]) -> ExportedProgram:
    """The inverse of :func:`integers_as_buffers` for these names."""
    state, specs = dict(program.state_dict), copy.deepcopy(program.graph_signature.input_specs)
    for spec in specs:
        if spec.kind == InputKind.BUFFER and spec.target in names:
            spec.kind, spec.persistent = InputKind.PARAMETER, None
            state[spec.target] = torch.nn.Parameter(state[spec.target], requires_grad=False)
    return with_constants(program, state, specs)

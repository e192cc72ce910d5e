"""pack:  linear layers on the constants that codes stand for  ->  ``spinpass::packed_linear`` on those codes.

    y = x Wᵀ + b, W float (out, in)   ->   y = packed_linear(x, qweight, scales, qzeros, g_idx, b, bits)

The codes are parameters of an integer dtype, by which :func:`spinpass.transform` and
:func:`spinpass.quantization.quantize` know a packed program and refuse it. The way back is :func:`unpack`, which has to
be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from spinpass.errors import ConfigError
from spinpass.graph import (
    ProgramEditor,
    arguments,
    integers_as_buffers,
    integers_as_parameters,
    op_name,
    reachable,
    shape,
    value,
    without_constants,
)
from spinpass.operators import dequantized, pack_words

from ..layers import operands, replace_product, sites_by_name, why_kept
from ..report import Quantized
from ..rounding import Codes

_aten = torch.ops.aten
_OPERATOR = "spinpass::packed_linear"


@dataclass(frozen=True)
class Packed:
    """A program on packed codes, and by parameter name why a quantized weight stayed a float constant."""

    program: ExportedProgram
    kept: Mapping[str, str]


def pack(quantized: Quantized) -> Packed:
    """Put the codes of a quantized program in place of the float constants that they stand for.

    Outputs are equal bit for bit where the layer is ``aten::linear`` on the stored weight. A product with a transposed
    one is summed in another order. Constants are called and laid out as in a GPTQ checkpoint: ``x.weight`` becomes
    ``x.qweight``, ``x.scales``, ``x.qzeros`` and, for groups of any columns, ``x.g_idx``; their shapes and dtypes are
    those in :mod:`spinpass.operators.packed_linear`. The quantized program is not changed.

    Raises:
        ConfigError: no weight of the program can be packed.
    """
    editor = ProgramEditor(quantized.program)
    sites = sites_by_name(editor)
    kept: dict[str, str] = {}
    dead: set[str] = set()
    for name, weight in quantized.report.weights.items():
        reason = why_kept(editor, sites.get(name, []))
        if reason:
            kept[name] = reason
            continue
        dead.update(editor.fqns(sites[name][0].weight))
        constants = _add_codes(editor, _module(name), weight.codes.on(value(sites[name][0].weight).device))
        for site in sites[name]:
            x, bias = operands(site)
            target = torch.ops.spinpass.packed_linear.default
            replace_product(editor, site.linear, target, x, *constants, bias, weight.codes.bits)
    if not dead:
        raise ConfigError("nothing to pack: " + "; ".join(f"{n}: {why}" for n, why in kept.items()))
    return Packed(without_constants(editor.finish(), dead), kept)


def unpack(program: ExportedProgram) -> ExportedProgram:
    """Dequantize the layers of a packed program, which can then be rotated and quantized again.

    Their weights are called ``x.weight`` and are float (out, in) in the dtype of the layer's input. Outputs are equal
    bit for bit. The packed program is not changed.

    Raises:
        ConfigError: the program has no packed layer.
    """

    def product(editor: ProgramEditor, node: Node) -> tuple[Any, ...]:
        args = arguments(node)
        weight = made.get(args["qweight"]) or _add_weight(editor, program, args)
        made[args["qweight"]] = weight
        return _aten.linear.default, args["x"], weight, args["bias"]

    made: dict[Node, Node] = {}
    return rewritten(program, product)


def rewritten(program: ExportedProgram, product: Callable[[ProgramEditor, Node], tuple[Any, ...]]) -> ExportedProgram:
    """The program with every packed layer replaced by the call that ``product`` makes of it.

    Codes that nothing reads any more are gone. The packed program is not changed.

    Args:
        program: packed.
        product: takes the editor and the node of a layer, and returns (target, *arguments).

    Raises:
        ConfigError: the program has no packed layer.
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
    """The stored constants that a node reads, itself or through an expression of constants."""
    constants = reachable(node, lambda n: filter(editor.is_constant, n.all_input_nodes))
    return {source for source in constants if editor.is_stored(source)}


def packed_layers(editor: ProgramEditor) -> list[Node]:
    """The nodes of the packed linear layers, in graph order."""
    return [node for node in editor.nodes if is_packed(node)]


def is_packed(node: Node) -> bool:
    """Whether the node is a packed linear layer."""
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


def _add_codes(editor: ProgramEditor, module: str, codes: Codes) -> tuple[Node | None, ...]:
    """(qweight, scales, qzeros, g_idx) as new constants of ``module``."""
    tensors = {
        "qweight": pack_words(codes.q.T, codes.bits, 0),
        "scales": codes.scales.T.contiguous(),
        "qzeros": pack_words(codes.zeros.T, codes.bits, 1),
        "g_idx": None if codes.index is None else codes.index.to(torch.int32),
    }
    return tuple(None if t is None else editor.add_constant(f"{module}.{part}", t) for part, t in tensors.items())


def _add_weight(editor: ProgramEditor, program: ExportedProgram, args: Mapping[str, Any]) -> Node:
    """The float weight of a packed layer as a new constant, in the dtype of the layer's input."""
    weight = weight_of(editor, program, args)
    return editor.add_constant(weight_name(editor, args["qweight"]), weight.to(value(args["x"]).dtype))


def weight_of(editor: ProgramEditor, program: ExportedProgram, args: Mapping[str, Any]) -> Tensor:
    """What the weight of a packed layer stands for, (out, in) in the scales' dtype."""
    qweight, scales, qzeros = (evaluated(editor, program, args[key]) for key in ("qweight", "scales", "qzeros"))
    g_idx = None if args["g_idx"] is None else evaluated(editor, program, args["g_idx"])
    columns = shape(args["x"])[-1]
    assert isinstance(columns, int)  # that of a stored weight
    return dequantized(qweight, scales, qzeros, g_idx, args["bits"], columns)


def scales_name(name: str) -> str:
    """``x.scales`` for ``x.weight``."""
    return f"{_module(name)}.scales"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def weight_name(editor: ProgramEditor, qweight: Node) -> str:
    """``x.weight`` for ``x.qweight``."""
    return editor.fqn(qweight).removesuffix(".qweight") + ".weight"

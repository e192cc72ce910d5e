"""Double quantization of a packed program:  its scales are computed in the graph from eight bits each.

    packed_linear(x, q, s, z, g, b)   ->   packed_linear(x, q, (qscales − qscales_zeros)·qscales_scales, z, g, b)

That is the form ``scales`` of :mod:`..rounding.double`, in which zero points stay packed integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.graph import ProgramEditor, arguments, value

from ..layers import ORIGIN
from ..rounding import round_statistics
from .program import evaluated, is_packed, rewritten

_aten = torch.ops.aten
_BITS = 8


def double_quantize_program(program: ExportedProgram, *, mode: int = 2, size: int | None = None) -> ExportedProgram:
    """Round the scales of every packed layer to eight bits and keep its codes. The program is not changed.

    Statistics are chosen as in double quantization of bitorch-engine's GBA layers, see :mod:`..rounding.double`, and
    have the dtype of the scales.

    Args:
        program: packed, as :func:`.program.pack` returns it.
        mode: 1 lets all groups of one output share statistics, 2 all outputs, or ``size`` side by side, of one group.
        size: how many outputs share statistics in mode 2. It must divide them. None takes all.

    Raises:
        ConfigError: the program has no packed layer, the mode is unknown, or the size does not divide the outputs.
    """
    made: dict[Node, Node] = {}

    def product(editor: ProgramEditor, node: Node) -> tuple[Any, ...]:
        args = arguments(node)
        key = args["scales"]
        if key not in made:
            made[key] = _decoded(editor, program, node, args, mode, size)
        return node.target, *(made[key] if name == "scales" else arg for name, arg in args.items())

    return rewritten(program, product)


def decode_scales(program: ExportedProgram) -> ExportedProgram:
    """The program with constants in place of scales that are computed in the graph, of the same values.

    A program without such scales is returned itself.
    """
    computed = [n for n in program.graph.nodes if is_packed(n) and arguments(n)["scales"].op != "placeholder"]
    if not computed:
        return program
    made: dict[Node, Node] = {}

    def product(editor: ProgramEditor, node: Node) -> tuple[Any, ...]:
        args = arguments(node)
        key, module = args["scales"], editor.fqn(args["qweight"]).removesuffix(".qweight")
        if key not in made:
            stored = editor.is_stored(key)
            made[key] = key if stored else editor.add_constant(f"{module}.scales", evaluated(editor, program, key))
        return node.target, *(made[key] if name == "scales" else arg for name, arg in args.items())

    return rewritten(program, product)


def _decoded(
    editor: ProgramEditor, program: ExportedProgram, at: Node, args: Mapping[str, Any], mode: int, size: int | None
) -> Node:
    """The last of the nodes that compute the scales (groups, out), which are added right before a layer."""
    scales = evaluated(editor, program, args["scales"])
    rounded = round_statistics(scales, mode, size, _BITS, scales.dtype)
    module = editor.fqn(args["qweight"]).removesuffix(".qweight")
    q, steps, zeros = (
        editor.add_constant(f"{module}.{name}", tensor)
        for name, tensor in (
            ("qscales", rounded.q),
            ("qscales_scales", rounded.scales),
            ("qscales_zeros", rounded.zeros),
        )
    )
    made = editor.call(_aten.to.dtype, q, value(args["scales"]).dtype, after=at.prev, origin=ORIGIN)
    for target, operand in (
        (_aten.sub.Tensor, zeros),
        (_aten.mul.Tensor, steps),
        (_aten.view.default, list(scales.shape)),
    ):
        made = editor.call(target, made, operand, after=at.prev, origin=ORIGIN)
    return made

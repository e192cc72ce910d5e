"""mixed rows:  a layer whose groups of inputs have several widths  ->  one layer for each width, and their sum.

    y = x Ŵᵀ + b   ->   y = Σ_b x[…, π_b] Ŵ_bᵀ + b,   π_b the inputs whose weights have b bits

Every term has codes of one width, which packing and all runtimes take as they are. Mixed widths within a weight are
what EXL2 files have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.errors import ConfigError
from spinpass.graph import ProgramEditor, integers_as_buffers, value, without_constants
from spinpass.passes import open_program

from ..layers import ORIGIN, WeightSite, operands, replace_product, sites_by_name, why_kept
from ..report import Quantized, QuantizedWeight

_aten = torch.ops.aten


def splittable(program: ExportedProgram) -> set[str]:
    """The names of the weights of a program whose layers can be split by their inputs."""
    editor = open_program(program)
    return {name for name, sites in sites_by_name(editor).items() if not why_kept(editor, sites)}


def split_rows(quantized: Quantized) -> Quantized:
    """Split the weights that have codes of several widths, in program and report.

    ``x.weight`` becomes ``x.bits2.weight``, ``x.bits4.weight`` and so on, each with the places of its inputs in
    ``x.bits2.inputs``, int64 (n,). A program without such weights is returned itself.

    Raises:
        ConfigError: a layer of such a weight is no product with the weight as it is stored.
    """
    mixed = {name: weight for name, weight in quantized.report.weights.items() if weight.codes.group_bits is not None}
    if not mixed:
        return quantized
    editor = ProgramEditor(quantized.program)
    sites = sites_by_name(editor)
    parts: dict[str, QuantizedWeight] = {}
    dead: set[str] = set()
    for name, weight in mixed.items():
        reason = why_kept(editor, sites.get(name, []))
        if reason:
            raise ConfigError(f"{name} cannot have groups of several widths: {reason}")
        dead.update(editor.fqns(sites[name][0].weight))
        split = _parts(name, weight)
        parts |= split
        _replace(editor, sites[name], split, [columns for columns, _ in weight.codes.parts().values()])
    program = integers_as_buffers(without_constants(editor.finish(), dead))
    kept = {name: weight for name, weight in quantized.report.weights.items() if name not in mixed}
    return Quantized(program, replace(quantized.report, weights=kept | parts))


def source_of(name: str, state: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """Return the name of the weight that a weight of a split program is a part of, and the columns; itself and None
    where it is none.

    Args:
        name: of the weight.
        state: the constants of the split program.
    """
    found = re.fullmatch(r"(.*)\.bits\d", name.removesuffix(".weight"))
    columns = state.get(f"{name.removesuffix('.weight')}.inputs")
    return (name, None) if found is None or columns is None else (f"{found[1]}.weight", columns)


def _parts(name: str, weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """The parts of a weight by their names, ascending in width."""
    made = {}
    for bits, (_, codes) in weight.codes.parts().items():
        scheme = replace(weight.scheme, bits=bits, group_bits=None)
        made[f"{name.removesuffix('.weight')}.bits{bits}.weight"] = QuantizedWeight(codes, 1, scheme, weight.error)
    return made


def _replace(
    editor: ProgramEditor, sites: Sequence[WeightSite], parts: Mapping[str, QuantizedWeight], places: Sequence[Tensor]
) -> None:
    """Put the sum of the parts' layers in place of each of ``sites``. ``places`` are the columns of the parts."""
    stored = value(sites[0].weight)
    weights, columns = list[Node](), list[Node]()
    for (name, part), at in zip(parts.items(), places, strict=True):
        weights.append(editor.add_constant(name, part.codes.dequantized().to(stored.device, stored.dtype)))
        columns.append(editor.add_constant(f"{name.removesuffix('.weight')}.inputs", at.to(stored.device)))
    for site in sites:
        x, bias = operands(site)
        picked = [_call(editor, site, _aten.index_select.default, x, -1, at) for at in columns]
        biases = (bias, *(None for _ in weights[1:]))
        *terms, last = (_call(editor, site, _aten.linear.default, *each) for each in zip(picked, weights, biases))
        total = terms[0]
        for term in terms[1:]:
            total = _call(editor, site, _aten.add.Tensor, total, term)
        replace_product(editor, site.linear, _aten.add.Tensor, total, last)


def _call(editor: ProgramEditor, site: WeightSite, target: Callable[..., Any], *args: Any) -> Node:
    """A new node right before the layer of ``site``."""
    return editor.call(target, *args, after=site.linear.prev, origin=ORIGIN)

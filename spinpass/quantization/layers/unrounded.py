"""round_tokens(x) Wᵀ  ->  x Wᵀ,  where a kernel rounds x by itself: in front of codes that are not eight bits a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.graph import ProgramEditor, arguments, op_name, value

from ..report import QuantizedWeight
from .products import operands, sites_by_name
from .sites import table_sites

_ROUNDING = "spinpass::round_tokens"


def unrounded_operands(program: ExportedProgram, weights: Mapping[str, QuantizedWeight]) -> ExportedProgram | None:
    """Return the program without the rounding to int8 per token that a file leaves to its weight kernels.

    Products of eight bits with eight bits have integer kernels, which round as the program does: they stay. A head that
    is the token table, too, is multiplied as other weights are, so that one copy serves both.

    Args:
        program: it rounds its activations.
        weights: what the quantization report holds, by parameter name.

    Returns:
        None where a layer is not spelled so that this can be told: the type of its values, or what it multiplies.
    """
    editor = ProgramEditor(program)
    tables = [program.state_dict[editor.fqn(table)] for table in table_sites(editor)]
    for name, sites in sites_by_name(editor).items():
        codes = weights[name].codes if name in weights else None
        per_row = codes is not None and codes.bits == 8 and codes.scales.shape[1] == 1
        if codes is None or (per_row and not _is_table(program.state_dict[name], tables)):
            continue
        for site in sites:
            taken = operands(site)
            if taken is None or value(taken[0]).dtype != torch.float32 or not _is_plain(taken[0]):
                return None
            given = arguments(taken[0]) if op_name(taken[0]) == _ROUNDING else {}
            if given and given["bits"] == 8 and given["symmetric"]:
                site.linear.replace_input_with(taken[0], given["x"])
    return editor.finish()


def _is_table(weight: Tensor, tables: list[Tensor]) -> bool:
    return any(weight.shape == table.shape and torch.equal(weight, table) for table in tables)


def _is_plain(x: Node) -> bool:
    """Return whether a value is rounded, or made of what is not: no channels are picked of a rounded one."""
    return op_name(x) == _ROUNDING or not any(op_name(source) == _ROUNDING for source in x.all_input_nodes)

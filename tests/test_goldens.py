"""Golden listings: the plan of eight tiny decoders and the program that comes of it, word for word.

They do not judge right and wrong, the other tests do: they show in a diff what a change of the code changes in its results, and
prove of a change that should alter nothing that it alters nothing. ``make goldens`` writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

import spinpass
from tests.mutations.experts import BmmInOut
from tests.support import decoders, modules

FOLDER = Path(__file__).parent / "goldens"


def _module(**options: Any) -> Callable[[], ExportedProgram]:
    return lambda: modules.export(dtype=torch.float64, **options)


def _experts() -> ExportedProgram:
    return decoders.exported(decoders.made(BmmInOut()))


PROGRAMS: dict[str, Callable[[], ExportedProgram]] = {
    "plain": _module(),
    "tied": _module(tied=True, qkv="fused", mlp="fused"),
    "layer_norm": _module(linear="conv1d", qkv="fused", mlp="plain", bias="all", norm="layer", positions="learned"),
    "sandwich": _module(placement="sandwich", norm="rms_plus_one", positions="rope_interleaved"),
    "value_head": _module(value_head=True, layer_scale=True, shared_norm=True, bias="qkv"),
    "static_cache": _module(static_cache=8, kv_heads=1, attention="eager"),
    "growing_cache": _module(cache=True, qk_norm=True, dynamic=True),
    "experts": _experts,
}


def _argument(argument: Any) -> str:
    if isinstance(argument, Node):
        return argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_argument, argument))}]"
    return str(argument)


def _value(node: Node) -> str:
    values = node.meta.get("val")
    found = values if isinstance(values, (list, tuple)) else [values]
    return ", ".join(
        f"{str(v.dtype).removeprefix('torch.')}[{', '.join(map(str, v.shape))}]" if isinstance(v, Tensor) else str(v)
        for v in found
    )


def _checksum(tensor: Tensor) -> str:
    """A weighted sum: rotations, which keep norms, change it."""
    values = tensor.detach().double().flatten()
    return f"{float(values @ torch.linspace(1.0, 2.0, len(values), dtype=torch.float64)):.5e}"


def _lines(program: ExportedProgram) -> list[str]:
    constants = {**program.state_dict, **program.constants}
    lines = []
    for spec in program.graph_signature.input_specs:
        held = constants.get(spec.target) if spec.target is not None else None
        content = f"  {_checksum(held)}" if isinstance(held, Tensor) else ""
        lines.append(f"{spec.kind.name.lower()} {spec.arg.name} {spec.target or ''}{content}".rstrip())
    for node in program.graph.nodes:
        given = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
        origin = node.meta.get("custom", {}).get("spinpass_origin", "")
        lines.append(f"{node.name} = {node.target}({given}): {_value(node)}" + (f"  # {origin}" if origin else ""))
    for spec in program.graph_signature.output_specs:
        lines.append(f"{spec.kind.name.lower()} {getattr(spec.arg, 'name', spec.arg)} {spec.target or ''}".rstrip())
    return lines


def listing(program: ExportedProgram) -> str:
    plan = spinpass.plan(program)
    result = spinpass.transform(program, spinpass.RotationConfig(verify=False))
    return "\n".join([str(plan), "", *_lines(result), ""])


@pytest.mark.parametrize("name", PROGRAMS)
def test_golden(name: str) -> None:
    file = FOLDER / f"{name}.txt"
    found = listing(PROGRAMS[name]())
    if os.environ.get("SPINPASS_WRITE_GOLDENS"):
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")

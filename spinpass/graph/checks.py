"""What a program must be to be rotated at all: an inference program over dense floating-point weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from spinpass.errors import ProgramError, QuantizedWeightError

from .handles import Handle
from .nodes import arguments, is_op, op_name

PACKED_TYPES = {torch.int8, torch.uint8, torch.int16, torch.int32}
"""The dtypes in which weights that are packed from integers are stored."""


def check_program(program: object) -> None:
    """Raise an error unless ``program`` is an inference program over dense floating-point weights.

    Raises:
        ProgramError: ``program`` is no ExportedProgram, or dropout is active in it.
        QuantizedWeightError: an operator works on quantized or packed weights, or a stored weight is one.
    """
    if not isinstance(program, ExportedProgram):
        raise ProgramError(
            f"expected a torch.export.ExportedProgram, got {type(program).__name__}; "
            "export the model first: torch.export.export(model, args)"
        )
    for node in program.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise ProgramError(f"{node.name} has no recorded value: take a program as torch.export made it")
        if not is_op(node):
            continue
        name = op_name(node)
        if _is_active_dropout(node):
            raise ProgramError(
                f"{node.name}: dropout is active (p={_dropout_rate(node)}), so the program computes no "
                "function that could be preserved; call model.eval() before exporting"
            )
        if name.split("::")[0] in _QUANTIZED_NAMESPACES or any(word in name for word in _QUANTIZED_WORDS):
            raise QuantizedWeightError(
                f"{node.name} ({name}) works on quantized or packed weights; rotate the "
                "floating-point program first and quantize the result"
            )
    for fqn, tensor in program.state_dict.items():
        if _is_packed(tensor):
            raise QuantizedWeightError(
                f"{fqn} is a quantized or packed weight ({type(tensor).__name__}, {tensor.dtype}); "
                "rotate the floating-point program first and quantize the result"
            )


def _is_packed(tensor: Tensor) -> bool:
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    if tensor.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, Handle):
        return True
    return isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())


def _is_active_dropout(node: Node) -> bool:
    bound = arguments(node)
    if op_name(node) in _DROPOUT:
        return float(bound.get("p", 1.0)) > 0.0 and bool(bound.get("train", True))
    return float(bound.get("dropout_p") or 0.0) > 0.0


def _dropout_rate(node: Node) -> Any:
    bound = arguments(node)
    return bound.get("p", bound.get("dropout_p"))


_DROPOUT = {"aten::dropout", "aten::native_dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::bernoulli"}
_QUANTIZED_NAMESPACES = {"quantized_decomposed", "torchao", "quantized", "bitsandbytes", "gptqmodel"}
_QUANTIZED_WORDS = (
    "dequantize",
    "_weight_int8pack_mm",
    "_weight_int4pack_mm",
    "_scaled_mm",
    "fake_quantize",
    "qlinear",
)


def is_size_class(name: str) -> bool:
    """Return whether expressions of sizes may apply the class of that name: sympy's own, or one that torch adds."""
    import sympy
    from torch.utils._sympy import functions

    found = getattr(functions, name, None) or getattr(sympy, name, None)
    return isinstance(found, type) and issubclass(found, sympy.Basic)


def assume(condition: bool) -> None:
    """Tell a trace under way that a condition on sizes holds, so that it writes one size in terms of the others."""
    torch._check(condition)  # type: ignore[no-untyped-call]

"""From an exported program to an ``onnx_ir`` model: torch's own translation, without the parts that cost minutes.

``torch.onnx.export`` retraces the program to decompose it and then tries every pattern of its optimizer on every node:
some 70 seconds of CPU for 30 layers, of which translating takes two. Here the program is decomposed only if it holds an
op that needs it, and the optimizer runs constant folding and the rules that can apply to what torch emits. The
resulting graph is the same.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.onnx._internal.exporter._dispatching import dispatch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from spinpass.errors import ExportError
from spinpass.graph import functional_target, is_check, is_op, mutates, op_name, value
from spinpass.quantization import decode_scales

from ..refusals import refuse_fake_weights, refuse_mutation
from .operators.experts import expert_translations
from .operators.hadamard import hadamard_translation
from .operators.packed_linear import packed_linear_translation
from .operators.rounding import round_rows_translation, round_tokens_translation, translate_round_tensor
from .optimise import optimise
from .streamed import read_when_written


def translate(ep: ExportedProgram, opset: int | None) -> ir.Model:
    """Return the optimised model of ``ep`` with its online Hadamards and packed layers still opaque.

    ``ep`` is not changed, constants are not copied. ``opset`` None is the one that torch translates to.

    Raises:
        ExportError: an op has no translation, the program writes to its inputs or buffers, or a weight has no values.
    """
    refuse_fake_weights(ep)

    ep = decode_scales(ep)
    table = _translations()
    with _quiet():
        program = _convert(_Program(ep), opset, table) or _convert(_Program(ep, decompose=True), opset, table)
    model: ir.Model = program.model
    read_when_written(model.graph)
    optimise(model)
    return model


def check_operators(ep: ExportedProgram) -> None:
    """Look for operators that :func:`translate` would stop at, in a moment and without a weight being read.

    An operator that torch decomposes passes, whatever it becomes.

    Raises:
        ExportError: an operator has no translation; the message names it and a node.
    """
    with _quiet():
        registry, table = ONNXRegistry.from_torchlib(), _translations()
    decomposed = torch.export.default_decompositions()
    graphs = [m.graph for m in ep.graph_module.modules() if isinstance(m, GraphModule)]
    for node in (n for graph in graphs for n in graph.nodes if is_op(n)):
        target = functional_target(node) if mutates(node) else node.target
        if target in table or target in decomposed or is_check(node) or mutates(node):
            continue
        if target._can_decompose():  # noqa: SLF001  nothing public says it
            continue
        if dispatch(node, registry)[0] is None:
            values = [value(n) for n in node.all_input_nodes]
            kind = " on complex values" if any(isinstance(v, Tensor) and v.is_complex() for v in values) else ""
            raise ExportError(
                f"torch.onnx has no translation of {op_name(node)}{kind} ({node.name}): export the model to another "
                "runtime (--to), or change its code so that it computes this with other operators"
            )


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return by operator what emits ONNX, for those that torch does not translate, or not as is wanted here."""
    return {
        torch.ops.spinpass.hadamard.default: hadamard_translation(),
        torch.ops.spinpass.round_tokens.default: round_tokens_translation(),
        torch.ops.spinpass.round_rows.default: round_rows_translation(),
        torch.ops.spinpass.round_tensor.default: translate_round_tensor,
        torch.ops.spinpass.packed_linear.default: packed_linear_translation(),
        **expert_translations(),
        **_FRESH,
    }


def _convert(ep: _Program, opset: int | None, table: dict[Any, Any]) -> Any:
    """Return what torch.onnx makes of the program; None where that fails and decomposing the program first may help."""
    try:
        return torch.onnx.export(ep, opset_version=opset, custom_translation_table=table, optimize=False, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        refusal = _refusal(error)
        if refusal is not None:
            raise refusal from error
        if ep.decompose:
            raise _untranslatable(error) from error
        return None


# -- decomposing ------------------------------------------------------------------------------------------------------


class _Program(ExportedProgram):
    """This is a copy of a program that decomposes itself only where it must, when ``torch.onnx.export`` asks for it."""

    def __init__(self, ep: ExportedProgram, *, decompose: bool = False) -> None:
        self.decompose = decompose
        graph = copy.deepcopy(ep.graph)
        super().__init__(
            root=GraphModule(ep.graph_module, graph),
            graph=graph,
            graph_signature=copy.deepcopy(ep.graph_signature),
            state_dict=ep.state_dict,
            range_constraints=ep.range_constraints,
            module_call_graph=copy.deepcopy(ep.module_call_graph),
            example_inputs=ep.example_inputs,
            constants=ep.constants,
            verifiers=ep.verifiers,
        )

    def run_decompositions(
        self, decomp_table: dict[Any, Any] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        table = dict(decomp_table or {})
        program: ExportedProgram = self
        self.decompose |= not all(_is_translatable(node, table) for node in self.graph.nodes)
        if self.decompose:
            own = torch.export.default_decompositions()
            table |= {target: own[target] for target in _FRESH if target in own}
            program = super().run_decompositions(table, decompose_custom_triton_ops)
        refuse_mutation(program, "an ONNX graph")
        return program


def _is_translatable(node: Node, table: Mapping[Any, Any]) -> bool:
    """Say whether the node has a translation of its own and leaves its arguments alone."""
    if not is_op(node):
        return node.op != "get_attr"  # the subgraph of a higher-order op
    return node.target not in table and (node.target in _FRESH or not mutates(node))


def _to_dtype(self: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return op.Cast(self, to=dtype)


def _to_device(
    self: Any, device: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> Any:
    return op.Cast(self, to=dtype)


def _to_layout(self: Any, *, dtype: int | None = None, **_: Any) -> Any:
    return op.Identity(self) if dtype is None else op.Cast(self, to=dtype)


def _detach(self: Any) -> Any:
    return op.Identity(self)


def _and(self: Any, other: Any) -> Any:
    return op.And(self, other) if self.dtype == ir.DataType.BOOL else op.BitwiseAnd(self, other)


def _or(self: Any, other: Any) -> Any:
    return op.Or(self, other) if self.dtype == ir.DataType.BOOL else op.BitwiseOr(self, other)


def _all_true(self: Any) -> Any:
    integers: Any = op.Cast(self, to=ir.DataType.INT32)
    least: Any = op.ReduceMin(integers, keepdims=0)
    return op.Cast(least, to=ir.DataType.BOOL)


_FRESH: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.to.dtype: _to_dtype,
    torch.ops.aten.to.device: _to_device,
    torch.ops.aten.to.dtype_layout: _to_layout,
    torch.ops.aten.detach_.default: _detach,
    torch.ops.aten.__and__.Tensor: _and,
    torch.ops.aten.__or__.Tensor: _or,
    torch.ops.aten._is_all_true.default: _all_true,  # noqa: SLF001  its name
}
"""Translations of the few ops that a fresh export holds and that torch translates only after decomposing."""


# -- refusals ---------------------------------------------------------------------------------------------------------


def _refusal(error: BaseException) -> ExportError | None:
    """Return the refusal of our own that torch.onnx wrapped in ``error``, if there is one."""
    return next((cause for cause in _causes(error) if isinstance(cause, ExportError)), None)


def _untranslatable(error: BaseException) -> ExportError:
    innermost = list(_causes(error))[-1]
    reason = (str(innermost).strip() or type(innermost).__name__).splitlines()[0]
    return ExportError(
        f"torch.onnx cannot translate the program: {reason}; replace that op or decompose it before the export"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.onnx says about packages that are not needed here, and about what it emits itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

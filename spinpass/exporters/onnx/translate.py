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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset18 as op
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from spinpass.errors import ExportError
from spinpass.graph import is_op, mutates
from spinpass.quantization import decode_scales

from ..refusals import refuse_fake_weights, refuse_mutation
from .operators.hadamard import hadamard_translation
from .operators.packed_linear import packed_linear_translation
from .operators.rounding import round_rows_translation, round_tokens_translation, translate_round_tensor

_RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.flatten_to_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
)
"""The general rules of onnxscript less those for convolutions and clips, and less SlicesSplit, which compares every
pair of nodes: half of the whole export's time, for one Split instead of two Slices."""

_ROUNDS = 2  # folding opens matches for the rules and the other way round; a third round finds nothing


def translate(ep: ExportedProgram, opset: int | None) -> ir.Model:
    """The optimised model of ``ep`` with its online Hadamards and packed layers still opaque. ``ep`` is not changed,
    constants are not copied.

    Raises:
        ExportError: an op that ONNX has no translation for, a program that writes to its inputs or buffers, fake
            weights.
    """
    refuse_fake_weights(ep)

    ep = decode_scales(ep)
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.spinpass.hadamard.default: hadamard_translation(),
        torch.ops.spinpass.round_tokens.default: round_tokens_translation(),
        torch.ops.spinpass.round_rows.default: round_rows_translation(),
        torch.ops.spinpass.round_tensor.default: translate_round_tensor,
        torch.ops.spinpass.packed_linear.default: packed_linear_translation(),
        **_CASTS,
    }
    with _quiet():
        program = _convert(_Program(ep), opset, table) or _convert(_Program(ep, decompose=True), opset, table)
    model: ir.Model = program.model
    _optimise(model)
    return model


def _convert(ep: _Program, opset: int | None, table: dict[Any, Any]) -> Any:
    """What torch.onnx makes of the program. None where that fails and decomposing the program first may help."""
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
    """A copy of a program that decomposes itself only where it must, which is what ``torch.onnx.export`` asks of it
    first."""

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
            table |= {target: own[target] for target in _CASTS if target in own}
            program = super().run_decompositions(table, decompose_custom_triton_ops)
        refuse_mutation(program, "an ONNX graph")
        return program


def _is_translatable(node: Node, table: Mapping[Any, Any]) -> bool:
    """The node has a translation of its own and leaves its arguments alone."""
    if not is_op(node):
        return node.op != "get_attr"  # the subgraph of a higher-order op
    return node.target not in table and (node.target in _CASTS or not mutates(node))


def _to_dtype(self: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return op.Cast(self, to=dtype)


def _to_device(
    self: Any, device: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> Any:
    return op.Cast(self, to=dtype)


def _detach(self: Any) -> Any:
    return op.Identity(self)


_CASTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.to.dtype: _to_dtype,
    torch.ops.aten.to.device: _to_device,
    torch.ops.aten.detach_.default: _detach,
}
"""Translations of the few ops that a fresh export holds and that torch translates only after decomposing."""


# -- optimising -------------------------------------------------------------------------------------------------------


def _optimise(model: ir.Model) -> None:
    """Fold constants, simplify and deduplicate, in place.

    A weight's transpose is folded where nothing else reads the weight, whatever its size; a tied table, shared first,
    stays one.
    """
    common.InlinePass()(model)
    _settle_sizes(model.graph)
    _share_initializers(model.graph)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _RULES)
    _drop_reshapes(model.graph)
    finish: Sequence[Any] = (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
    )
    for simplify in finish:
        simplify(model)


def _settle_sizes(graph: ir.Graph) -> None:
    """A size that export has found to be a number is written as one: torch makes a name of it, ``"2"``, in caches."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is None:
            continue
        sizes = [size if isinstance(size, int) else size.value for size in value.shape]
        value.shape = ir.Shape([int(s) if isinstance(s, str) and s.isdigit() else s for s in sizes])


def _drop_reshapes(graph: ir.Graph) -> None:
    """Reshape(x) -> x where both have the same shape, symbols included: what ``reshape`` of a fresh export often is."""
    for node in list(graph):
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Reshape" or x is None or x.shape is None or x.shape != y.shape or y.is_graph_output():
            continue
        if all(isinstance(size, int) or size.value is not None for size in x.shape):
            ir.convenience.replace_all_uses_with(y, x)
            graph.remove(node, safe=True)


def _share_initializers(graph: ir.Graph) -> None:
    """One initializer for every tensor in memory: constants tied in the program stay one in the file."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        raw = value.const_value.raw if isinstance(value.const_value, ir.Tensor) else None
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0:
            continue
        kept = first.setdefault((raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride()), value)
        if kept is not value and not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[str(value.name)]


# -- refusals ---------------------------------------------------------------------------------------------------------


def _refusal(error: BaseException) -> ExportError | None:
    """The refusal of our own that torch.onnx wrapped in ``error``."""
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
    """Silence what torch.onnx says about packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)

"""``export``: an exported program becomes a .pte file that stock ExecuTorch runs, online Hadamards included.

Hadamards become linear layers (:mod:`spinpass.passes.lower_hadamards`) and quantized layers integers
(:mod:`.integers`); the XNNPACK delegate takes both. The file is compared with the program before it appears under its
name, by rename.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from spinpass import execution
from spinpass.errors import ConfigError, ExportError, ProgramError, first_line
from spinpass.execution import origin
from spinpass.formats import pte_path
from spinpass.graph import mutates, op_name
from spinpass.passes import give_own_constants, lower_hadamards
from spinpass.quantization import Quantized

from ..certified_file import Clock, FileReport, write_certified
from ..names import signature_names
from .certificate import PteCertificate, certify_pte
from .integers import IntegerLayers, with_integer_layers

Backend = Literal["xnnpack", "portable"]
_UNBOUNDED = 2**31
INTEGER_BOUND = 0.05
"""On the relative error of a file with integer layers: a value that lies at a tie may be rounded either way."""


@dataclass(frozen=True, kw_only=True)
class PteReport(FileReport):
    """This is what :func:`export` wrote.

    ``delegates`` counts the calls of the backend, ``operators`` what is left to ExecuTorch's own kernels, by name.
    ``integer_layers`` counts the linear layers on integers; ``scale_error`` is the largest relative change of their
    scales by bfloat16, and ``kept`` says why quantized weights stayed float.
    """

    certificate: PteCertificate | None
    backend: Backend
    delegates: int
    operators: Mapping[str, int]
    integer_layers: int
    scale_error: float
    kept: Mapping[str, str]

    KEYS: ClassVar[tuple[str, ...]] = (
        "path", "bytes", "backend", "delegates", "operators", "integer_layers", "scale_error", "kept", "certificate",
        "uncertified", "seconds",
    )  # fmt: skip


def export(
    program: ExportedProgram | Quantized,
    path: str | Path,
    *,
    backend: Backend = "xnnpack",
    verify: bool = True,
    inputs: object = None,
    progress: Callable[[str], None] | None = None,
) -> PteReport:
    """Write a program for ExecuTorch. The program is not changed; dynamic axes stay dynamic.

    Args:
        program: an inference program whose dynamic axes have upper bounds, with the caches that it updates in its
            buffers if it has any (:func:`spinpass.loading.export_static_cache`). Or what
            :func:`spinpass.quantization.quantize` returned, with 8-bit activations: its layers become integers.
        path: ``.../name.pte``, or a folder, which then gets ``model.pte``. An existing file is replaced.
        backend: ``xnnpack`` delegates what XNNPACK has kernels for, ``portable`` nothing (floats only; slow).
        verify: compare what ExecuTorch returns with the program.
        inputs: what to compare on; None draws small inputs from the program's own specs, several times.
        progress: it is called with the name of each step before it starts.

    Raises:
        ProgramError: ``program`` is neither a program nor a quantized one.
        ConfigError: an axis has no upper bound, an option does not fit, or a layer has no kernel.
        ExportError: ExecuTorch does not have an operator, or nothing can be written there.
        VerificationError: the file would not compute what the program computes. In every case nothing is left behind.
    """
    _check(program, backend)
    target = pte_path(path)
    clock = Clock(progress)
    clock.start("lower")
    lowered = _lowered(program)
    _check_operators(lowered.program)
    operators: Counter[str] = Counter()

    def save(file: Path) -> None:
        clock.start("delegate")
        found, manager = _translated(lowered.program, backend)
        operators.update(found)
        clock.start("write")
        with open(file, "wb") as stream:
            manager.write_to_file(stream)

    def compare(file: Path) -> PteCertificate:
        return certify_pte(lowered.program, file, inputs, INTEGER_BOUND if lowered.layers else None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and ExecuTorch's own; what matters is an error or in the report
        names = signature_names(lowered.program)
        report = write_certified(target, names, clock, save, compare if verify else None, verify=verify)
    return PteReport(
        **vars(report),
        backend=backend,
        delegates=operators.pop("executorch_call_delegate", 0),
        operators=operators,
        integer_layers=lowered.layers,
        scale_error=lowered.scale_error,
        kept=lowered.kept,
    )


def _check(program: object, backend: str) -> None:
    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(get_args(Backend))}")
    if isinstance(program, Quantized):
        if backend != "xnnpack":
            raise ConfigError(
                f"integer layers run in XNNPACK alone, not with backend={backend!r}: export quantized.program, which "
                "simulates them in floats"
            )
        program = program.program
    if not isinstance(program, ExportedProgram):
        raise ProgramError(
            f"export takes a torch.export.ExportedProgram or a Quantized one, got {type(program).__name__}"
        )
    for spec in execution.user_inputs(program):
        for axis, size in enumerate(spec.shape):
            if not _is_bounded(program, size):
                raise ConfigError(
                    f"axis {axis} of {spec.name} has no upper bound, and ExecuTorch plans its memory for the largest "
                    "sizes: export the program with torch.export.Dim(name, max=...) there"
                )


def _is_bounded(program: ExportedProgram, size: Any) -> bool:
    if isinstance(size, int):
        return True
    ranges = [program.range_constraints.get(symbol) for symbol in size.free_symbols]
    return all(allowed is not None and allowed.upper < _UNBOUNDED for allowed in ranges)


def _lowered(program: ExportedProgram | Quantized) -> IntegerLayers:
    """Return the program as ExecuTorch takes it; there are no integers in it unless it is quantized."""
    if isinstance(program, ExportedProgram):
        return IntegerLayers(give_own_constants(lower_hadamards(program)), 0, 0.0, {})
    plain = lower_hadamards(program.program)
    return with_integer_layers(Quantized(give_own_constants(plain, but=program.report.weights.keys()), program.report))


def _check_operators(program: ExportedProgram) -> None:
    own = sorted({op_name(node) for node in program.graph.nodes if op_name(node).startswith("spinpass::")})
    if own:
        raise ExportError(
            f"ExecuTorch has no {', '.join(own)}: caches, 4-bit and static activations are simulated only; quantize "
            "weights and 8-bit activations, for example w4g32-bf16-gptq-a8asym, and export what quantize returned"
        )


def _translated(program: ExportedProgram, backend: Backend) -> tuple[Counter[str], Any]:
    """Return the operators of the delegated graph, counted by name, and the file's content."""
    partitioners = [XnnpackPartitioner()] if backend == "xnnpack" else []
    initialised = _initialised_buffers(program)
    passes = [InitializedMutableBufferPass(initialised)] if initialised else []
    try:
        edge: Any = to_edge_transform_and_lower(program, partitioner=partitioners)
        counted = Counter(_operator(node) for node in edge.exported_program().graph.nodes if node.op == "call_function")
        return counted, edge.to_executorch(ExecutorchBackendConfig(passes=passes))
    except Exception as error:  # ExecuTorch's own have no common base below Exception
        raise ExportError(f"ExecuTorch cannot take the program: {first_line(error)}") from error


def _operator(node: torch.fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return "getitem" if name == "getitem" else name


def _initialised_buffers(program: ExportedProgram) -> list[str]:
    """List the placeholders of buffers that the program updates and that do not start as zeros."""
    signature = program.graph_signature
    written = {origin(source).name for node in program.graph.nodes if mutates(node) for source in node.all_input_nodes}
    updated = {spec.target for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    return [
        spec.arg.name
        for spec in signature.input_specs
        if spec.kind is InputKind.BUFFER
        and (spec.arg.name in written or spec.target in updated)
        and bool(_stored(program, str(spec.target)).count_nonzero())
    ]


def _stored(program: ExportedProgram, name: str) -> Tensor:
    tensor: Tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
    return tensor

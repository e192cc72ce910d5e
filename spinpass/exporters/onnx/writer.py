"""``export``: an exported program becomes an ONNX file that stock ONNX Runtime runs, online Hadamards included.

The Hadamards stay recognisable as calls of functions of the domain ``spinpass`` (see :mod:`.operators.hadamard`). The
file is compared with the program before it appears under its name, and appears by rename.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from torch.export import ExportedProgram

from spinpass.certificate import FileCertificate
from spinpass.errors import ConfigError, ProgramError
from spinpass.formats import CACHE_BUFFERS, EXTERNAL_BYTES, PROTOBUF_LIMIT, data_name, model_path, remove_stale_data
from spinpass.quantization import QuantizedWeight
from spinpass.runtime import NoKernelError
from spinpass.workers import Team

from ..certified_file import Clock, FileReport, resident_bytes, write_certified
from ..names import GraphNames, Names, named_record, renamed, signature_names
from .certificate import certify_onnx
from .fusion.fuse import Fused, fuse_model
from .integers.copies import QuantizeReport, weight_bytes
from .integers.rewrite import Work
from .integers.weights import pack_translated
from .naming import name_axes, name_by_module
from .operators.experts import lower_grouped_products
from .operators.hadamard import attach_hadamards
from .operators.packed_linear import lower_packed_linears
from .operators.rounding import attach_roundings
from .shares import help_save, save_shared
from .translate import translate


@dataclass(frozen=True, kw_only=True)
class OnnxReport(FileReport):
    """This is what :func:`export` wrote.

    ``opset`` is the model's, ``hadamards`` the number of online Hadamards in the graph. ``fused`` is what became of
    attention and norms, None where it was not asked for. ``packed`` is what became of weights whose integers were
    given.
    """

    opset: int
    hadamards: int
    fused: Fused | None = None
    packed: QuantizeReport | None = None

    KEYS: ClassVar[tuple[str, ...]] = (
        "path", "files", "bytes", "opset", "inputs", "outputs", "hadamards", "certificate", "uncertified", "seconds",
        "fused",
    )  # fmt: skip

    def fused_lines(self) -> list[str]:
        """Say what was fused, and of every attention that was not, why; no lines where it was not asked for."""
        return [] if self.fused is None else [self.fused.summary, *(f"not fused: {why}" for why in self.fused.kept)]


def export(
    ep: ExportedProgram,
    path: str | Path,
    *,
    input_names: Names = None,
    output_names: Names = None,
    opset: int | None = None,
    fuse: bool = False,
    external_data: bool | None = None,
    external_threshold: int = EXTERNAL_BYTES,
    verify: bool | None = None,
    inputs: object = None,
    metadata: Mapping[str, str] | None = None,
    weights: Mapping[str, QuantizedWeight] | None = None,
    accuracy_level: int = 0,
    team: Team | None = None,
    progress: Callable[[str], None] | None = None,
) -> OnnxReport:
    """Write ``ep`` as ONNX. The program is not changed; dynamic axes stay dynamic.

    Args:
        ep: an inference program; dtypes float32, float64, float16, and bfloat16 where ONNX Runtime has kernels.
        path: ``.../name.onnx``, or a folder, which then gets ``model.onnx``. Existing files are replaced.
        input_names, output_names: a sequence for all of them or {name in the program: new name}. By default inputs have
            the names of the program's placeholders and outputs the keys of the returned structure (``logits``,
            ``past_key_values_0``), or the program's own names where it has no keys; ``output.`` stands in front where
            an input has that name.
        opset: the model's ONNX opset; None takes the one torch translates to.
        fuse: use ONNX Runtime's own operators for attention, rotary embeddings and norms where they compute the same
            (:mod:`.fusion`). The file then needs ONNX Runtime, and takes several tokens on top of a cache for one
            sequence at a time; prompts and single tokens in batches.
        external_data: put the weights into ``name.onnx.data`` beside the file; None does that above
            ``external_threshold`` bytes.
        verify: compare ONNX Runtime's outputs with the program's. None does so up to 2 GiB of weights in memory and
            where ONNX Runtime has the kernels on a CPU; True insists.
        inputs: what to compare on; None draws small inputs from the program's own specs, several times.
        metadata: further ``metadata_props`` of the model.
        weights: constants of the program that become integers in the file, with their codes: what the report of
            :func:`spinpass.quantization.quantize` holds, by parameter name.
        accuracy_level: how products with such integers are computed, see :func:`.integers.weights.pack_weights`.
        team: of whose ranks this is the first; the others call :func:`assist`, and all write the data together.
        progress: it is called with the name of each step before it starts.

    Raises:
        ProgramError: ``ep`` is not an ExportedProgram.
        ConfigError: a name or an option does not fit.
        ExportError: an op has no translation, state is written in place, ONNX Runtime cannot run the result, or nothing
            can be written there.
        VerificationError: the file would not compute what the program computes. In every case nothing is left behind.
    """
    if not isinstance(ep, ExportedProgram):
        raise ProgramError(f"export takes a torch.export.ExportedProgram, got {type(ep).__name__}")
    target = model_path(path)
    clock = Clock(progress)
    clock.start("translate")
    names = renamed(signature_names(ep), input_names, output_names)
    made = _translated(ep, names, opset, fuse, metadata, weights, accuracy_level)
    model, fused, work = made.model, made.fused, made.work
    size = weight_bytes(model)
    external = size > external_threshold if external_data is None else external_data
    if not external and size > PROTOBUF_LIMIT:
        raise ConfigError(
            f"one ONNX file cannot hold {size:,} bytes of weights: leave external_data at None or set it to True"
        )

    def save(path: Path) -> None:
        clock.start("write")
        save_shared(model, path, data_name(target) if external else None, team or Team())

    def compare(path: Path) -> FileCertificate | str:
        try:
            attention = fused is not None and fused.attention > 0
            return certify_onnx(ep, path, inputs, fused=attention, prepack=not external or _has_integers(model))
        except NoKernelError as error:
            if verify:
                raise
            return str(error)

    resident = resident_bytes(ep)
    report = write_certified(target, names, clock, save, compare, weights=size, resident=resident, verify=verify)
    remove_stale_data(target, report.files)
    packed = None
    if work is not None:
        packed = QuantizeReport.of(work, report.path, report.files, before=made.before, after=report.bytes)
    opset = model.opset_imports[""]
    return OnnxReport(**vars(report), opset=opset, hadamards=made.hadamards, fused=fused, packed=packed)


def assist(
    ep: ExportedProgram,
    team: Team,
    *,
    input_names: Names = None,
    output_names: Names = None,
    opset: int | None = None,
    fuse: bool = False,
    weights: Mapping[str, QuantizedWeight] | None = None,
    accuracy_level: int = 0,
) -> None:
    """Write this rank's part of the data of a file that rank 0 of a team exports; arguments as for :func:`export`."""
    names = renamed(signature_names(ep), input_names, output_names)
    help_save(lambda: _translated(ep, names, opset, fuse, None, weights, accuracy_level).model, team)


@dataclass(frozen=True)
class _Translated:
    """A model that is to be written: what was fused and packed in it, how many Hadamards it has, and how many bytes of
    weights it had before they were packed."""

    model: ir.Model
    fused: Fused | None
    work: Work | None
    hadamards: int
    before: int


def _translated(
    ep: ExportedProgram,
    names: GraphNames,
    opset: int | None,
    fuse: bool,
    metadata: Mapping[str, str] | None,
    weights: Mapping[str, QuantizedWeight] | None,
    accuracy_level: int,
) -> _Translated:
    model = translate(ep, opset)
    fused = fuse_model(model) if fuse else None
    about = {} if fused is None else {"spinpass.fused": json.dumps(fused.to_dict())}
    about |= {CACHE_BUFFERS: "true"} if fused is not None and fused.caches else {}
    name_axes(model, ep, {name: names.inputs[index] for name, index in names.input_index.items()})
    parameters = frozenset((*ep.state_dict, *ep.constants))
    hadamards = _finish(model, names, parameters, _record(ep, names) | about | dict(metadata or {}))
    before = weight_bytes(model)
    work = pack_translated(model, ep.state_dict, weights, accuracy_level=accuracy_level) if weights else None
    return _Translated(model, fused, work, hadamards, before)


def _finish(model: ir.Model, names: GraphNames, parameters: frozenset[str], metadata: Mapping[str, str]) -> int:
    """Give the model its names, metadata, kernels of packed layers and functions, in place; return how many Hadamards
    there are."""
    lower_packed_linears(model)
    lower_grouped_products(model)
    hadamards = attach_hadamards(model)
    attach_roundings(model)
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), (*names.inputs, *names.outputs), strict=True):
        value.name = name
    name_by_module(model, parameters)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
    model.metadata_props.update({"spinpass.hadamards": str(hadamards), **metadata})
    return hadamards


def _record(ep: ExportedProgram, names: GraphNames) -> dict[str, str]:
    found = named_record(ep, names.inputs, names.outputs)
    return {} if found is None else {"spinpass.record": json.dumps(found)}


def _has_integers(model: ir.Model) -> bool:
    """Say whether there are products with packed integers, whose kernels need them in their own order."""
    return any(node.op_type == "MatMulNBits" for node in model.graph.all_nodes())

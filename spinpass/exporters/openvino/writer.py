"""``export``: an exported program becomes an OpenVINO model, ``.xml`` and ``.bin``, online Hadamards as products.

Weights of a quantized program are integers there (:mod:`.integers`). The files are compared with the program, computed
by OpenVINO in float32, before they appear under their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram

from spinpass import record
from spinpass.certificate import FileCertificate, FileComparison, of_draws
from spinpass.errors import ConfigError, ExportError, ProgramError
from spinpass.formats import xml_path
from spinpass.graph import op_name, shape, value
from spinpass.passes import lower_hadamards, repeat_heads
from spinpass.quantization import Quantized, QuantizedWeight
from spinpass.runtime import CompiledModel, import_openvino, openvino_reason

from ..certified_file import Clock, FileReport, write_certified
from ..names import GraphNames, Names, renamed, signature_names
from ..refusals import refuse_fake_weights, refuse_mutation
from .integers import check_integers, check_written, put_integers

_TYPES = (torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True, kw_only=True)
class OpenVINOReport(FileReport):
    """This is what :func:`export` wrote. ``integers`` counts the constants that are integers."""

    integers: int = 0

    KEYS: ClassVar[tuple[str, ...]] = (*FileReport.KEYS[:-1], "integers", "seconds")


def export(
    program: ExportedProgram | Quantized,
    path: str | Path,
    *,
    input_names: Names = None,
    output_names: Names = None,
    verify: bool | None = None,
    inputs: object = None,
    progress: Callable[[str], None] | None = None,
) -> OpenVINOReport:
    """Write a program as an OpenVINO model.

    The program is not changed; dynamic axes stay dynamic, a KV cache stays inputs and outputs, weights keep their
    precision or are the quantizer's integers. What a rotated program says about itself is the model's runtime info
    ``spinpass/record``.

    Args:
        program: an inference program, or what :func:`spinpass.quantization.quantize` returned, of weights alone.
        path: ``.../name.xml``, or a folder, which then gets ``openvino_model.xml``. Existing files are replaced.
        input_names, output_names: what to rename, as :func:`spinpass.exporters.onnx.export` takes it.
        verify: compare OpenVINO's outputs, computed in float32, with the program's. None does so up to 2 GiB of
            weights; True insists.
        inputs: what to compare on; None draws small inputs from the program's own specs, several times.
        progress: it is called with the name of each step before it starts.

    Raises:
        ProgramError: ``program`` is neither a program nor a quantized one.
        QuantizedWeightError: it has packed weights and online Hadamards.
        ConfigError: a name does not fit, or there is no form for the integers of a weight.
        ExportError: OpenVINO is missing or cannot convert or run the program, or nothing can be written there.
        VerificationError: the files would not compute what the program computes, or hold other integers. In every case
            nothing is left behind.
    """
    ep = program.program if isinstance(program, Quantized) else program
    if not isinstance(ep, ExportedProgram):
        raise ProgramError(
            f"export takes a torch.export.ExportedProgram or a Quantized one, got {type(program).__name__}"
        )
    target = _checked_path(path)
    openvino = import_openvino()
    integers: Mapping[str, QuantizedWeight] = {}
    if isinstance(program, Quantized):
        check_integers(program)
        integers = program.report.weights
    refuse_fake_weights(ep)
    refuse_mutation(ep, "an OpenVINO model")
    clock = Clock(progress)
    clock.start("translate")
    names = renamed(signature_names(ep), input_names, output_names)
    lowered = repeat_heads(lower_hadamards(ep))
    _refuse_operators(lowered)
    model = _convert(openvino, lowered)
    _close_finitely(openvino, model)
    _name_ports(model, names)
    _fix_shapes(openvino, model, ep)
    count = put_integers(openvino, model, integers) if integers else 0  # last: fixing shapes would rewrite them
    if (found := record.read(ep)) is not None:
        model.set_rt_info(json.dumps(found.to_dict()), ["spinpass", "record"])
    weights = sum(t.nbytes for t in {id(t): t for t in (*ep.state_dict.values(), *_tensors(ep.constants))}.values())

    def save(file: Path) -> None:
        clock.start("write")
        openvino.save_model(model, str(file), compress_to_fp16=False)
        if integers:
            clock.start("read back")
            check_written(openvino, file, integers)

    def compare(file: Path) -> FileCertificate | str:
        return _compared(ep, file, inputs, insist=bool(verify))

    report = write_certified(target, names, clock, save, compare, weights=weights, verify=verify)
    return OpenVINOReport(**vars(report), integers=count)


def _checked_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix and path.suffix != ".xml" and not path.is_dir():
        raise ConfigError(f"{path} does not end in .xml, the name of an OpenVINO model")
    return xml_path(path)


def _refuse_operators(lowered: ExportedProgram) -> None:
    """Raise ConfigError where the program has operators of spinpass, which are roundings and packed layers."""
    found = sorted({name for name in map(op_name, lowered.graph.nodes) if name.startswith("spinpass::")})
    if found:
        raise ConfigError(
            f"OpenVINO has no {', '.join(found)}: export what quantize returned for weights alone, for example "
            "w4g64-asym-gptq, or spinpass.lower(program), which simulates the rest in floats"
        )


def _convert(openvino: Any, program: ExportedProgram) -> Any:
    try:
        return openvino.convert_model(program)
    except Exception as error:  # the frontend's errors have no common base below Exception
        raise ExportError(
            f"OpenVINO {openvino.__version__} cannot convert the program: {openvino_reason(error)}; "
            "replace that operator or decompose it before the export"
        ) from error


def _close_finitely(openvino: Any, model: Any) -> None:
    """attention(q, k, v, closed)  ->  attention(q, k, v, where(closed, 0, lowest)), in place.

    OpenVINO makes −∞ of a boolean mask, and of a token that sees nothing, as padding does, a NaN. That would reach the
    others through the cache; the lowest finite number closes a place as well.
    """
    op = openvino.opset13
    made: dict[str, Any] = {}
    for node in [each for each in model.get_ordered_ops() if each.get_type_name() == "ScaledDotProductAttention"]:
        if node.get_input_size() < 4 or node.get_input_element_type(3) != openvino.Type.boolean:
            continue
        mask, kind = node.input_value(3), node.get_input_element_type(0)
        name = f"{mask.get_node().get_name()}.{mask.get_index()}"
        if name not in made:
            lowest = torch.finfo(torch.float16 if kind == openvino.Type.f16 else torch.float32).min
            made[name] = op.select(mask, op.constant(0.0, kind), op.constant(lowest, kind))
        node.input(3).replace_source_output(made[name].output(0))


def _name_ports(model: Any, names: GraphNames) -> None:
    """Put the signature's names on the model's ports, which come in the same order."""
    for ports, wanted, what in ((model.inputs, names.inputs, "inputs"), (model.outputs, names.outputs, "outputs")):
        if len(ports) != len(wanted):
            raise ExportError(
                f"OpenVINO's model has {len(ports)} {what} where the program has {len(wanted)} "
                f"({', '.join(wanted)}): one of them is unused or returned twice; export the program without it"
            )
        for port, name in zip(ports, wanted):
            port.get_tensor().set_names({name})


def _fix_shapes(openvino: Any, model: Any, ep: ExportedProgram) -> None:
    """Put the program's own shapes on the inputs: the frontend leaves out sizes that it does not need."""
    taken = [node for node in ep.graph.nodes if node.name in ep.graph_signature.user_inputs]
    tensors = [node for node in taken if isinstance(value(node), torch.Tensor)]
    shapes = [[size if isinstance(size, int) else -1 for size in shape(node)] for node in tensors]
    model.reshape({port: openvino.PartialShape(sizes) for port, sizes in zip(model.inputs, shapes, strict=True)})


def _compared(ep: ExportedProgram, path: Path, inputs: object, *, insist: bool) -> FileCertificate | str:
    """Return the certificate, or why there can be none; with ``insist`` that is an ExportError."""
    drawn = FileComparison.drawn(ep, inputs)
    without = {t.dtype for t in (*drawn[0][0].fed, *drawn[0][0].expected)} - set(_TYPES)
    if without:
        why = f"OpenVINO's Python interface has no {', '.join(map(str, without))}"
        if insist:
            raise ExportError(f"the model cannot be certified: {why}; pass verify=False to write it all the same")
        return why
    model = CompiledModel(path)
    return of_draws([[_certify(comparison, model) for comparison in cases] for cases in drawn])


def _certify(comparison: FileComparison, model: CompiledModel) -> FileCertificate:
    return comparison.certificate(model.inputs, model.outputs, model.run(comparison.fed), "OpenVINO model")


def _tensors(constants: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in constants.values() if isinstance(value, torch.Tensor)]

"""The certificate continued onto an ONNX file: ONNX Runtime's outputs against the program's, for the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from spinpass import execution, synthetic
from spinpass.certificate import BOUNDS

from .file_certificate import (
    FileCertificate,
    FileOutput,
    as_tensor,
    compare_output,
    constant_outputs,
    describe,
    narrowest_dtype,
)
from .onnx_session import from_ort, open_session, run, to_ort

OnnxOutput = FileOutput


@dataclass(frozen=True)
class OnnxCertificate(FileCertificate):
    """How far an ONNX file is from the program."""

    kind: str = "ONNX file"


def certify(ep: ExportedProgram, path: Path, inputs: object = None) -> OnnxCertificate:
    """Run the file at ``path`` (CPU, default optimisations) and ``ep`` on ``inputs`` and compare.

    ``inputs`` as in :func:`spinpass.execution.flat_inputs`; None makes them from the program's own specs. Inputs and
    outputs of the file are matched to the program's by position.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        ConfigError: the inputs do not fit the program.
    """
    values = synthetic.synthetic_inputs(ep) if inputs is None else execution.flat_inputs(ep, inputs)
    expected = [v for v, constant in zip(execution.run(ep, values), constant_outputs(ep), strict=True) if not constant]
    session = open_session(path)
    constant = {spec.arg.name for spec in ep.graph_signature.input_specs if isinstance(spec.arg, ConstantArgument)}
    fed = [value for name, value in values.items() if name not in constant]
    names = [i.name for i in session.get_inputs()]
    feed = {name: to_ort(as_tensor(value)) for name, value in zip(names, fed, strict=True)}
    found = map(from_ort, run(session, feed))
    dtype = narrowest_dtype(ep)
    outputs = [
        compare_output(output.name, as_tensor(reference), result, BOUNDS[dtype])
        for output, reference, result in zip(session.get_outputs(), expected, found, strict=True)
    ]
    described = tuple(f"{name} {describe(value)}" for name, value in zip(names, fed, strict=True))
    return OnnxCertificate(tuple(outputs), dtype, described)

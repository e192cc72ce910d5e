"""The certificate continued onto the ONNX file: ONNX Runtime's outputs against the program's, for the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass import execution
from spinpass.certificate import Comparison, FileCertificate, badness
from spinpass.runtime import from_ort, open_session, run, to_ort

from .cases import fused_cases

KIND = "ONNX file"


def certify(ep: ExportedProgram, path: Path, inputs: object = None, *, fused: bool = False) -> FileCertificate:
    """Run the file at ``path`` (CPU, default optimisations) and ``ep`` on ``inputs`` and compare.

    ``inputs`` as in :func:`spinpass.execution.flat_inputs`; None makes them from the program's own specs. Inputs and
    outputs of the file are matched to the program's by position. A ``fused`` file is compared on several parts of them,
    see :mod:`.cases`, and each output is where it is worst.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        ConfigError: the inputs do not fit the program.
    """
    values = execution.synthetic_inputs(ep) if inputs is None else execution.flat_inputs(ep, inputs)
    session = open_session(path)
    found = [_certify(ep, session, case) for case in (fused_cases(ep, values) if fused else [values])]
    outputs = tuple(max(same, key=badness) for same in zip(*(c.outputs for c in found), strict=True))
    return FileCertificate(outputs, found[0].dtype, tuple(text for c in found for text in c.inputs), KIND)


def _certify(ep: ExportedProgram, session: Any, values: object) -> FileCertificate:
    comparison = Comparison.of(ep, values)
    names = [i.name for i in session.get_inputs()]
    feed = {name: to_ort(value) for name, value in zip(names, comparison.fed, strict=True)}
    results = map(from_ort, run(session, feed))
    return comparison.certificate(names, [o.name for o in session.get_outputs()], results, KIND)

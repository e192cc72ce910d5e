"""The certificate continued onto an ONNX file: ONNX Runtime's outputs against the program's, for the same inputs."""

from __future__ import annotations

from pathlib import Path

from torch.export import ExportedProgram

from .file_certificate import Comparison
from .file_certificate import FileCertificate as OnnxCertificate
from .file_certificate import FileOutput as OnnxOutput
from .onnx_session import from_ort, open_session, run, to_ort

__all__ = ["OnnxCertificate", "OnnxOutput", "certify"]


def certify(ep: ExportedProgram, path: Path, inputs: object = None) -> OnnxCertificate:
    """Run the file at ``path`` (CPU, default optimisations) and ``ep`` on ``inputs`` and compare.

    ``inputs`` as in :func:`spinpass.execution.flat_inputs`; None makes them from the program's own specs. Inputs and
    outputs of the file are matched to the program's by position.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        ConfigError: the inputs do not fit the program.
    """
    comparison = Comparison.of(ep, inputs)
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]
    feed = {name: to_ort(value) for name, value in zip(names, comparison.fed, strict=True)}
    results = map(from_ort, run(session, feed))
    return comparison.certificate(names, [o.name for o in session.get_outputs()], results, "the ONNX file")

"""An ONNX file against any program of the same model, for example the original of a rotated file.

Where :func:`.certificate.certify_onnx` compares a file with the program it was written from, the two here may carry a
KV cache in different bases. What each says about itself (:mod:`spinpass.record`; ``spinpass.record`` in the file's
metadata) is undone: both are given the same cache in their own basis, and both results are read in the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass import execution, record
from spinpass.certificate import BOUNDS, FileCertificate, FileOutput, difference_of
from spinpass.errors import VerificationError
from spinpass.formats import onnx_record
from spinpass.record import Carried
from spinpass.runtime import DTYPES, from_ort, open_session, run_session, to_ort

from ..names import signature_names
from .certificate import KIND


def compare_file(program: ExportedProgram, path: Path) -> FileCertificate:
    """Run both on synthetic inputs made from the specs of ``program``; inputs and outputs are matched by position.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        VerificationError: the two do not even take and return the same things.
    """
    session = open_session(path)
    names, there = (
        signature_names(program),
        onnx_record(path, session.get_modelmeta().custom_metadata_map)[1],
    )
    found = record.read(program)
    here_in = found.inputs if found else {}
    here_out = {names.output_index[i]: carried for i, carried in found.outputs.items()} if found else {}
    plain = execution.synthetic_inputs(program)
    given = {name: torch.as_tensor(plain[name], device="cpu") for name in names.inputs}
    _check(session, given, len(names.outputs), path)
    own = {name: _rotated(value, here_in.get(name)) for name, value in plain.items()}
    returned = execution.run(program, own)
    files = [i.name for i in session.get_inputs()]
    feed = {
        file: to_ort(_rotated(value, there.get(file)))
        for file, value in zip(files, given.values(), strict=True)
    }  # fmt: skip
    results = map(from_ort, run_session(session, feed))
    expected = {index: torch.as_tensor(returned[i], device="cpu") for i, index in names.output_index.items()}
    dtype = max({t.dtype for t in expected.values()} & BOUNDS.keys(), key=_roundoff, default=torch.float32)
    outputs = [
        _output(output.name, _rotated(expected[i], here_out.get(i), back=True),
                _rotated(result, there.get(output.name), back=True), dtype)
        for i, (output, result) in enumerate(zip(session.get_outputs(), results, strict=True))
    ]  # fmt: skip
    return FileCertificate(tuple(outputs), dtype, tuple(f"{n} {list(v.shape)}" for n, v in given.items()), KIND)


def _check(session: Any, given: Mapping[str, Tensor], outputs: int, path: Path) -> None:
    ours = [(value.dtype, value.ndim) for value in given.values()]
    theirs = [(DTYPES.get(i.type), len(i.shape)) for i in session.get_inputs()]
    if ours != theirs:
        taken = ", ".join(f"{i.name} {i.type} of rank {len(i.shape)}" for i in session.get_inputs())
        raise VerificationError(f"the program takes other inputs ({', '.join(given)}) than {path.name} ({taken})")
    if outputs != len(session.get_outputs()):
        raise VerificationError(f"the program returns {outputs} values and {path.name} {len(session.get_outputs())}")


def _rotated(value: Any, carried: Carried | None, *, back: bool = False) -> Any:
    """Return x R, or with ``back`` x R⁻¹, of a cache; the dtype is kept."""
    if carried is None:
        return value
    return carried.applied(value, inverse=back).to(value.dtype)


def _output(name: str, reference: Tensor, result: Tensor, dtype: torch.dtype) -> FileOutput:
    floating = reference.is_floating_point() or reference.is_complex()
    difference = difference_of(reference, result, argmax=floating and reference.ndim == 3)
    return FileOutput(name, tuple(reference.shape), difference, BOUNDS[dtype] if floating else 0.0)


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps

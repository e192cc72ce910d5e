"""The certificate continued onto an ONNX file: ONNX Runtime's outputs against the program's, for the same inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from spinpass import execution, synthetic
from spinpass.certificate import BOUNDS, Difference, compare
from spinpass.errors import VerificationError

from .onnx_cases import fused_cases
from .onnx_session import from_ort, open_session, run, to_ort


@dataclass(frozen=True)
class OnnxOutput:
    """One output: ONNX Runtime's value against the program's. ``bound`` is on the error relative to
    ``difference.scale``; it is 0 for integers."""

    name: str
    shape: tuple[int, ...]
    difference: Difference
    bound: float

    @property
    def ok(self) -> bool:
        return self.difference.relative <= self.bound


@dataclass(frozen=True)
class OnnxCertificate:
    """How far the file is from the program. ``dtype`` is the narrowest float type the program computes in, which sets
    the bound (:data:`spinpass.certificate.BOUNDS`); ``inputs`` says what both were given."""

    outputs: tuple[OnnxOutput, ...]
    dtype: torch.dtype
    inputs: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(output.ok for output in self.outputs)

    @property
    def worst(self) -> OnnxOutput:
        """The output that fails, else the one with the largest relative error."""
        return max(self.outputs, key=_badness)

    @property
    def verdict(self) -> str:
        """One line: equivalent or not, and by how much."""
        if not self.outputs:
            return "equivalent: the program has no outputs"
        name, difference, bound = self.worst.name, self.worst.difference, self.worst.bound
        found = f"{name}: max |error| {difference.error:.1e}, relative {difference.relative:.1e}, bound {bound:.0e}"
        return f"equivalent: at worst {found}" if self.ok else f"NOT equivalent: {found}"

    def raise_if_failed(self) -> None:
        """VerificationError naming the worst output, unless :attr:`ok`."""
        if not self.ok:
            raise VerificationError(f"the ONNX file does not compute what the program computes: {self.verdict}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; errors that are not finite become strings."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "dtype": str(self.dtype).removeprefix("torch."),
            "inputs": list(self.inputs),
            "outputs": [
                {
                    "name": o.name,
                    "shape": list(o.shape),
                    "max_abs_error": _plain(o.difference.error),
                    "max_abs": _plain(o.difference.scale),
                    "argmax_agreement": o.difference.argmax,
                    "bound": o.bound,
                    "ok": o.ok,
                }
                for o in self.outputs
            ],
        }


def certify(ep: ExportedProgram, path: Path, inputs: object = None, *, fused: bool = False) -> OnnxCertificate:
    """Run the file at ``path`` (CPU, default optimisations) and ``ep`` on ``inputs`` and compare.

    ``inputs`` as in :func:`spinpass.execution.flat_inputs`; None makes them from the program's own specs. Inputs and
    outputs of the file are matched to the program's by position. A ``fused`` file is compared on several parts of them,
    see :mod:`.onnx_cases`, and each output is where it is worst.

    Raises:
        ExportError: ONNX Runtime cannot load or run the file.
        ConfigError: the inputs do not fit the program.
    """
    values = synthetic.synthetic_inputs(ep) if inputs is None else execution.flat_inputs(ep, inputs)
    session = open_session(path)
    found = [_certify(ep, session, case) for case in (fused_cases(ep, values) if fused else [values])]
    outputs = tuple(max(same, key=_badness) for same in zip(*(c.outputs for c in found), strict=True))
    return OnnxCertificate(outputs, found[0].dtype, tuple(text for c in found for text in c.inputs))


def _certify(ep: ExportedProgram, session: Any, values: Mapping[str, Any]) -> OnnxCertificate:
    returned = execution.run(ep, dict(values))
    expected = [v for v, constant in zip(returned, _constant_outputs(ep), strict=True) if not constant]
    constant = {spec.arg.name for spec in ep.graph_signature.input_specs if isinstance(spec.arg, ConstantArgument)}
    fed = [value for name, value in values.items() if name not in constant]
    names = [i.name for i in session.get_inputs()]
    feed = {name: to_ort(_tensor(value)) for name, value in zip(names, fed, strict=True)}
    found = map(from_ort, run(session, feed))
    dtype = _narrowest(ep)
    outputs = [
        _compare(output.name, _tensor(reference), result, dtype)
        for output, reference, result in zip(session.get_outputs(), expected, found, strict=True)
    ]
    described = tuple(f"{name} {_describe(value)}" for name, value in zip(names, fed, strict=True))
    return OnnxCertificate(tuple(outputs), dtype, described)


def _badness(output: OnnxOutput) -> tuple[bool, float]:
    return not output.ok, output.difference.relative


def _compare(name: str, reference: Tensor, result: Tensor, dtype: torch.dtype) -> OnnxOutput:
    exact = not (reference.is_floating_point() or reference.is_complex())
    difference = compare(reference, result, argmax=not exact)
    return OnnxOutput(name, tuple(reference.shape), difference, 0.0 if exact else BOUNDS[dtype])


def _narrowest(ep: ExportedProgram) -> torch.dtype:
    """The float type with the largest roundoff among all values of the program; float32 if there is none."""
    values = [node.meta.get("val") for node in ep.graph.nodes]
    found = {value.dtype for value in values if isinstance(value, Tensor) and value.dtype in BOUNDS}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _constant_outputs(ep: ExportedProgram) -> Sequence[bool]:
    return [
        isinstance(s.arg, ConstantArgument) for s in ep.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"
    ]


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _describe(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _plain(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)

"""The certificate continued onto a file: what a runtime makes of it against the program, for the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from spinpass import execution, synthetic
from spinpass.certificate import BOUNDS, Difference, compare
from spinpass.errors import VerificationError


@dataclass(frozen=True)
class FileOutput:
    """One output: the runtime's value against the program's. ``bound`` is on the error relative to
    ``difference.scale``; it is 0 for integers."""

    name: str
    shape: tuple[int, ...]
    difference: Difference
    bound: float

    @property
    def ok(self) -> bool:
        return self.difference.relative <= self.bound


@dataclass(frozen=True)
class FileCertificate:
    """How far ``file`` is from the program. ``dtype`` is the narrowest float type the program computes in, which sets
    the bound (:data:`spinpass.certificate.BOUNDS`); ``inputs`` says what both were given."""

    outputs: tuple[FileOutput, ...]
    dtype: torch.dtype
    inputs: tuple[str, ...]
    file: str = "the ONNX file"

    @property
    def ok(self) -> bool:
        return all(output.ok for output in self.outputs)

    @property
    def worst(self) -> FileOutput:
        """The output that fails, else the one with the largest relative error."""
        return max(self.outputs, key=lambda o: (not o.ok, o.difference.relative))

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
            raise VerificationError(f"{self.file} does not compute what the program computes: {self.verdict}")

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


@dataclass(frozen=True)
class Comparison:
    """A program run once: ``fed`` are the tensors that a file of it takes, ``expected`` those that it should return,
    both in the order of the signature and without what export specialised to a constant."""

    fed: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    dtype: torch.dtype

    @staticmethod
    def of(ep: ExportedProgram, inputs: object = None) -> Comparison:
        """``inputs`` as in :func:`spinpass.execution.flat_inputs`; None makes them from the program's own specs. Raises
        ConfigError where they do not fit."""
        values = synthetic.synthetic_inputs(ep) if inputs is None else execution.flat_inputs(ep, inputs)
        returned = zip(execution.run(ep, values), _constant_outputs(ep), strict=True)
        constant = {spec.arg.name for spec in ep.graph_signature.input_specs if isinstance(spec.arg, ConstantArgument)}
        return Comparison(
            tuple(_tensor(value) for name, value in values.items() if name not in constant),
            tuple(_tensor(value) for value, is_constant in returned if not is_constant),
            _narrowest(ep),
        )

    def certificate(
        self, inputs: Sequence[str], outputs: Sequence[str], results: Iterable[Tensor], file: str
    ) -> FileCertificate:
        """What the runtime returned against what was expected, under the file's own names."""
        compared = zip(outputs, self.expected, results, strict=True)
        described = (f"{name} {_describe(value)}" for name, value in zip(inputs, self.fed, strict=True))
        found = (compare_output(name, reference, result, self.dtype) for name, reference, result in compared)
        return FileCertificate(tuple(found), self.dtype, tuple(described), file)


def compare_output(name: str, reference: Tensor, result: Tensor, dtype: torch.dtype) -> FileOutput:
    """Floats within the bound of ``dtype``, integers exactly."""
    exact = not (reference.is_floating_point() or reference.is_complex())
    difference = compare(reference, result, argmax=not exact)
    return FileOutput(name, tuple(reference.shape), difference, 0.0 if exact else BOUNDS[dtype])


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


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _plain(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)

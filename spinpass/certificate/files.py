"""How far an exported file is from the program it was written from: output by output, whatever runs the file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from spinpass import execution
from spinpass.errors import VerificationError

from .certificate import BOUNDS, Difference, difference_of, has_finite


@dataclass(frozen=True)
class FileOutput:
    """This is one output: the runtime's value against the program's. ``bound`` is the largest error allowed, relative
    to ``difference.scale``; it is 0 for integers. ``compared`` says whether any value of the program's is finite, or it
    has none; else nothing was compared."""

    name: str
    shape: tuple[int, ...]
    difference: Difference
    bound: float
    compared: bool = True

    @property
    def ok(self) -> bool:
        """Say whether the error keeps to the bound."""
        return self.compared and self.difference.relative <= self.bound


@dataclass(frozen=True)
class FileCertificate:
    """The certificate says how far a file is from the program.

    ``dtype`` is the narrowest float type the program computes in, which sets the bound
    (:data:`spinpass.certificate.BOUNDS`); ``inputs`` says what both were given, and ``kind`` what the file is.
    """

    outputs: tuple[FileOutput, ...]
    dtype: torch.dtype
    inputs: tuple[str, ...]
    kind: str = "exported file"

    @property
    def ok(self) -> bool:
        """Say whether every output keeps to its bound."""
        return all(output.ok for output in self.outputs)

    @property
    def worst(self) -> FileOutput:
        """Return the output that fails, else the one with the largest relative error."""
        return max(self.outputs, key=badness)

    @property
    def verdict(self) -> str:
        """Say in one line whether the two are equivalent, and how far apart they are."""
        if not self.outputs:
            return "equivalent: the program has no outputs"
        name, difference, bound = self.worst.name, self.worst.difference, self.worst.bound
        if not self.worst.compared:
            return f"NOT equivalent: {name}: no value of it is finite, so that nothing was compared"
        found = f"{name}: max |error| {difference.error:.1e}, relative {difference.relative:.1e}, bound {bound:.0e}"
        return f"equivalent: at worst {found}" if self.ok else f"NOT equivalent: {found}"

    def raise_if_failed(self) -> None:
        """Raise VerificationError, which names the worst output, unless :attr:`ok`."""
        if not self.ok:
            raise VerificationError(f"the {self.kind} does not compute what the program computes: {self.verdict}")

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; errors that are not finite become strings."""
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
class FileComparison:
    """This is a program run once: ``fed`` are the tensors that a file of it takes, ``expected`` those that it should
    return, both in the order of the signature and without what export specialised to a constant."""

    fed: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    dtype: torch.dtype

    @staticmethod
    def of(ep: ExportedProgram, inputs: object = None) -> FileComparison:
        """Run the program on ``inputs``, which are what :func:`spinpass.execution.flat_inputs` takes.

        None makes them from the program's own specs. Raises ConfigError where they do not fit.
        """
        values = execution.synthetic_inputs(ep) if inputs is None else execution.flat_inputs(ep, inputs)
        returned = zip(execution.run(ep, values), constant_outputs(ep), strict=True)
        constant = {spec.arg.name for spec in ep.graph_signature.input_specs if isinstance(spec.arg, ConstantArgument)}
        return FileComparison(
            tuple(as_tensor(value) for name, value in values.items() if name not in constant),
            tuple(as_tensor(value) for value, is_constant in returned if not is_constant),
            narrowest_dtype(ep),
        )

    def certificate(
        self, inputs: Sequence[str], outputs: Sequence[str], results: Iterable[Tensor], kind: str
    ) -> FileCertificate:
        """Compare what the runtime returned with what was expected, under the file's own names."""
        compared = zip(outputs, self.expected, results, strict=True)
        described = (f"{name} {describe(value)}" for name, value in zip(inputs, self.fed, strict=True))
        found = (compare_output(name, reference, result, BOUNDS[self.dtype]) for name, reference, result in compared)
        return FileCertificate(tuple(found), self.dtype, tuple(described), kind)


def badness(output: FileOutput) -> tuple[bool, float]:
    """Return a key that sorts the worst output last."""
    return not output.ok, output.difference.relative


def worst_of_runs(runs: Sequence[FileOutput]) -> FileOutput:
    """Return what was found about one output in several runs, of which one at least has to have compared something."""
    compared = [output for output in runs if output.compared] or runs
    return max(compared, key=badness)


def compare_output(name: str, reference: Tensor, result: Tensor, bound: float) -> FileOutput:
    """Compare one output; ``bound`` holds for floats, integers and booleans must be equal."""
    exact = not (reference.is_floating_point() or reference.is_complex())
    difference = difference_of(reference, result, argmax=not exact)
    return FileOutput(name, tuple(reference.shape), difference, 0.0 if exact else bound, has_finite(reference))


def narrowest_dtype(ep: ExportedProgram) -> torch.dtype:
    """Return the float type with the largest roundoff among all values of the program; float32 if there is none."""
    values = [node.meta.get("val") for node in ep.graph.nodes]
    found = {value.dtype for value in values if isinstance(value, Tensor) and value.dtype in BOUNDS}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def constant_outputs(ep: ExportedProgram) -> Sequence[bool]:
    """Say for every user output whether export made it a plain constant."""
    return [
        isinstance(s.arg, ConstantArgument) for s in ep.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"
    ]


def as_tensor(value: Any) -> Tensor:
    """Return a scalar as a tensor without axes."""
    return value if isinstance(value, Tensor) else torch.tensor(value)


def describe(value: Any) -> str:
    """Write a tensor as ``float32[2, 5]``, and anything else as it is."""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _plain(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)

"""How far an exported file is from the program it was written from: output by output, whatever runs the file.

Both are given the draws that two programs are given (:func:`spinpass.execution.draws`), and an error counts against the
values around it, as there (:mod:`.vectors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from spinpass import execution
from spinpass.errors import ProgramError, VerificationError
from spinpass.execution import InputRole, Watch
from spinpass.values import Fields, check_told, notebook_table, titled

from .certificate import BOUNDS, Difference, difference_of, dtype_name, has_finite, named_dtype, plain_numbers
from .vectors import Noise, Returned, Rounding, judged, vector_error

_VERSION = 1

_Values = Mapping[str, Any]
_Cases = Callable[[_Values], Sequence[_Values]]
_Equal = Collection[Collection[Any]]
_T = TypeVar("_T")
_C = TypeVar("_C", bound="FileCertificate")


@dataclass(frozen=True)
class FileOutput:
    """This is one output: the runtime's value against the program's. ``bound`` is the largest error allowed, relative
    to ``difference.scale``; it is 0 for integers. ``compared`` says whether any value of the program's is finite, or it
    has none; else nothing was compared. ``vectors`` is the largest error relative to the size of its own row and column
    (:mod:`spinpass.certificate.vectors`)."""

    name: str
    shape: tuple[int, ...]
    difference: Difference
    bound: float
    compared: bool = True
    vectors: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; errors that are not finite become texts."""
        fields = {
            "name": self.name,
            "shape": self.shape,
            "max_abs_error": self.difference.error,
            "max_abs": self.difference.scale,
            "max_vector_error": self.vectors,
            "argmax_agreement": self.difference.argmax,
            "bound": self.bound,
            "compared": self.compared,
            "ok": self.ok,
        }
        return {name: plain_numbers(found) for name, found in fields.items()}

    @staticmethod
    def from_dict(data: Fields) -> FileOutput:
        """Read what :meth:`to_dict` has written. Raises ConfigError where a field is missing or wrong."""
        agreement = data.perhaps("argmax_agreement", data.number)
        return FileOutput(
            name=data.text("name"),
            shape=data.counts("shape"),
            difference=Difference(data.number("max_abs_error"), data.number("max_abs"), agreement),
            bound=data.number("bound"),
            compared=data.flag("compared"),
            vectors=data.number("max_vector_error"),
        )

    @property
    def ok(self) -> bool:
        """Say whether the error keeps to the bound."""
        return self.compared and self.error <= self.bound

    @property
    def error(self) -> float:
        """Return the larger of the two relative errors, that of the whole and that of vectors."""
        return max(self.difference.relative, self.vectors)


@dataclass(frozen=True, repr=False)
class FileCertificate:
    """The certificate says how far a file is from the program. A notebook shows it as a table.

    ``dtype`` is the narrowest float type the program computes in, which sets the bound
    (:data:`spinpass.certificate.BOUNDS`); ``inputs`` says what both were given first, ``draws`` how many sets of inputs
    there were, and ``kind`` what the file is.
    """

    outputs: tuple[FileOutput, ...]
    dtype: torch.dtype
    inputs: tuple[str, ...]
    kind: str = "exported file"
    draws: int = 1

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
        if self.worst.vectors > max(difference.relative, bound):
            return (
                f"NOT equivalent: {name}: relative {self.worst.vectors:.1e} to the values around it, bound {bound:.0e}"
            )
        found = f"{name}: max |error| {difference.error:.1e}, relative {difference.relative:.1e}, bound {bound:.0e}"
        return f"equivalent: at worst {found}" if self.ok else f"NOT equivalent: {found}"

    def raise_if_failed(self) -> None:
        """Raise VerificationError, which names the worst output, unless :attr:`ok`."""
        if not self.ok:
            raise VerificationError(f"the {self.kind} does not compute what the program computes: {self.verdict}")

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; errors that are not finite become texts."""
        fields = {
            "ok": self.ok,
            "verdict": self.verdict,
            "kind": self.kind,
            "dtype": dtype_name(self.dtype),
            "inputs": list(self.inputs),
            "draws": self.draws,
            "outputs": [o.to_dict() for o in self.outputs],
        }
        return titled("file certificate", _VERSION, fields)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FileCertificate:
        """Return the certificate that :meth:`to_dict` has written.

        Raises ConfigError: it is none, one of another version, incomplete, or says what its numbers do not.
        """
        fields = Fields.of(data, "file certificate", _VERSION)
        found = FileCertificate(
            outputs=tuple(map(FileOutput.from_dict, fields.each("outputs"))),
            dtype=named_dtype(fields),
            inputs=fields.texts("inputs"),
            kind=fields.text("kind"),
            draws=fields.count("draws"),
        )
        check_told("file certificate", data, found.to_dict())
        return found

    def __repr__(self) -> str:
        return f"<FileCertificate: {self.kind}, {self.verdict}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the verdict and every output, those that fail first."""
        rows = [
            (o.name, "x".join(map(str, o.shape)), "ok" if o.ok else "FAIL", f"{o.difference.scale:.3g}",
             f"{o.difference.error:.1e}", f"{o.error:.1e}", f"{o.bound:.0e}")
            for o in sorted(self.outputs, key=badness, reverse=True)
        ]  # fmt: skip
        head = ("output", "shape", "", "max|ref|", "error", "relative", "bound")
        notes = (f"inputs: {', '.join(self.inputs)}; {self.draws} draw{'s' * (self.draws != 1)}",)
        return notebook_table(f"{self.kind}: {self.verdict}", head, rows, numbers=4, notes=notes)


@dataclass(frozen=True)
class FileComparison:
    """This is a program run once: ``fed`` are the tensors that a file of it takes, ``expected`` those that it should
    return, both in the order of the signature and without what export specialised to a constant; ``noise`` measures how
    far rounding moves each of those."""

    fed: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    dtype: torch.dtype
    noise: tuple[Noise, ...]

    @staticmethod
    def of(ep: ExportedProgram, inputs: object = None) -> FileComparison:
        """Run the program on ``inputs``, which are what :func:`spinpass.execution.flat_inputs` takes.

        None makes them from the program's own specs. Raises ConfigError where they do not fit.
        """
        values = execution.synthetic_inputs(ep) if inputs is None else execution.flat_inputs(ep, inputs)
        returned = zip(execution.run(ep, values), constant_outputs(ep), strict=True)
        constant = {spec.arg.name for spec in ep.graph_signature.input_specs if isinstance(spec.arg, ConstantArgument)}
        expected = {i: as_tensor(value) for i, (value, is_constant) in enumerate(returned) if not is_constant}
        rounding = rounding_of(ep, values)
        return FileComparison(
            tuple(as_tensor(value) for name, value in values.items() if name not in constant),
            tuple(expected.values()),
            narrowest_dtype(ep),
            tuple(partial(rounding.of_output, i) for i in expected),
        )

    @staticmethod
    def drawn(
        ep: ExportedProgram, inputs: object = None, cases: _Cases = lambda values: [values], equal: _Equal = ()
    ) -> list[list[FileComparison]]:
        """Run the program on the cases of ``inputs``, or where there are none on those of each draw that it takes.

        ``equal`` are groups of size symbols that the file takes for one.
        """
        return on_draws(ep, inputs, lambda values: [FileComparison.of(ep, case) for case in cases(values)], equal)

    def certificate(
        self, inputs: Sequence[str], outputs: Sequence[str], results: Iterable[Tensor], kind: str
    ) -> FileCertificate:
        """Compare what the runtime returned with what was expected, under the file's own names."""
        compared = zip(outputs, self.expected, results, self.noise, strict=True)
        described = (f"{name} {describe(value)}" for name, value in zip(inputs, self.fed, strict=True))
        bound = BOUNDS[self.dtype]
        found = (compare_output(name, expected, result, bound, noise) for name, expected, result, noise in compared)
        return FileCertificate(tuple(found), self.dtype, tuple(described), kind)


def on_draws(ep: ExportedProgram, inputs: object, run: Callable[[_Values], _T], equal: _Equal = ()) -> list[_T]:
    """Return what ``run`` makes of ``inputs``, or where there are none of each draw that the program takes.

    ``equal`` is that of :func:`spinpass.execution.draws`. The first key is open in the masks that are drawn: what a
    token that sees nothing becomes differs between kernels, and nobody reads it.

    Raises:
        ProgramError: the program does not take the first draw, which ``run`` raises.
        ConfigError: the inputs do not fit the program.
    """
    given = [[execution.flat_inputs(ep, inputs)]] if inputs is not None else []
    masks = [s.name for s in execution.user_inputs(ep) if s.role is InputRole.MASK and len(s.shape) in (1, 2)]
    drawn = given or [[_opened(values, masks) for values in each] for each in execution.draws(ep, equal)]
    found: list[_T] = []
    for i, alternatives in enumerate(drawn):
        for values in alternatives:
            try:
                found.append(run(values))
                break
            except ProgramError:
                if i == 0:
                    raise
    return found


def _opened(values: _Values, masks: Sequence[str]) -> dict[str, Any]:
    """Return values with the first key of these masks open."""
    opened = {name: values[name].clone() for name in masks}
    for mask in opened.values():
        mask[..., :1] = 1
    return {**values, **opened}


def of_draws(certificates: Sequence[Sequence[_C]]) -> _C:
    """Return one certificate for the cases of each draw, with the worst of each output and the inputs of the first."""
    every = [certificate for cases in certificates for certificate in cases]
    outputs = tuple(map(worst_of_runs, zip(*(certificate.outputs for certificate in every), strict=True)))
    inputs = tuple(text for certificate in certificates[0] for text in certificate.inputs)
    return replace(every[0], outputs=outputs, inputs=inputs, draws=len(certificates))


def rounding_of(ep: ExportedProgram, values: _Values) -> Rounding:
    """Return what measures how far rounding moves the outputs of a program on these values.

    Operators that round to integers may exist in the program's own dtypes alone; then it is run and shaken in those.
    """

    def run(watches: Sequence[Watch | None], *, lifted: bool) -> list[Returned]:
        given = [execution.copies(values) for _ in watches]
        found = execution.execute_each(ep, given, float64=lifted, watch=watches)
        return [(result.outputs, result.state) for result in found]

    def runs(watches: Sequence[Watch]) -> tuple[Returned, list[Returned]]:
        try:
            plain, *shaken = run([None, *watches], lifted=True)
        except ProgramError:
            plain, *shaken = run([None, *watches], lifted=False)
        return plain, shaken

    return Rounding(runs, torch.finfo(narrowest_dtype(ep)).eps)


def badness(output: FileOutput) -> tuple[bool, float]:
    """Return a key that sorts the worst output last."""
    return not output.ok, output.error


def worst_of_runs(runs: Sequence[FileOutput]) -> FileOutput:
    """Return what was found about one output in several runs, of which one at least has to have compared something."""
    compared = [output for output in runs if output.compared or output.error > 0] or runs
    return max(compared, key=badness)


def compare_output(name: str, reference: Tensor, result: Tensor, bound: float, noise: Noise) -> FileOutput:
    """Compare one output; ``bound`` holds for floats, integers and booleans must be equal, and so must the dtypes."""
    exact = not (reference.is_floating_point() or reference.is_complex())
    if reference.dtype != result.dtype:
        return FileOutput(name, tuple(reference.shape), Difference(math.inf, 1.0, None), 0.0 if exact else bound)
    difference = difference_of(reference, result, argmax=not exact)
    shape, compared = tuple(reference.shape), has_finite(reference)
    if exact:
        return FileOutput(name, shape, difference, 0.0, compared)
    vectors = vector_error(reference, result, bound, noise)
    return FileOutput(name, shape, judged(difference, bound, noise), bound, compared, vectors)


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
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def describe(value: Any) -> str:
    """Write a tensor as ``float32[2, 5]``, and anything else as it is."""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)

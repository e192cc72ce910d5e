"""What :func:`spinpass.verify` found: a frozen value that prints as a table and turns into JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spinpass.errors import VerificationError
from spinpass.values import Fields, check_told, columns, notebook_table, titled

_VERSION = 1
_ROWS = 12  # how many outputs the table shows

BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest error allowed of an output, relative to its largest absolute value.

float64 is the proof that both programs are one function. The others say how far two correct programs may drift apart by
rounding alone: some tens of roundoff units for the half types (u = 4.9e-4 and 3.9e-3), some thousands for float32
(u = 6e-8), whose models are deeper.
"""

NOISE_FACTOR = 4.0
"""An original that is itself noisier than that (its own error against float64) excuses this multiple of its noise."""

STORED_UNITS = 8.0
"""How many roundoff units are allowed of constants that were changed and stored again in a narrower type.

They carry one rounding each, which the float64 comparison sees. ``NOISE_FACTOR`` times the original's noise is allowed
where that is more.
"""


@dataclass(frozen=True)
class Difference:
    """One output compared with its reference.

    Attributes:
        error: max |error|.
        scale: max |reference|.
        argmax: the share of vectors along the last axis whose argmax is the same; None where that says nothing.
    """

    error: float
    scale: float
    argmax: float | None

    @staticmethod
    def from_dict(data: Fields) -> Difference:
        """Read what a certificate has written. Raises ConfigError where a field is missing or wrong."""
        return Difference(data.number("error"), data.number("scale"), data.perhaps("argmax", data.number))

    @property
    def relative(self) -> float:
        """Return error / scale: 0 for no error, and infinity where there is one and the reference is all zero."""
        if self.error == 0:
            return 0.0
        return self.error / self.scale if self.scale > 0 else math.inf

    def worst(self, other: Difference) -> Difference:
        """Return the worse of two comparisons of one output, for example of two steps of a closed loop.

        The share of equal argmax is the smaller one of both.
        """
        agreements = [d.argmax for d in (self, other) if d.argmax is not None]
        base = max(self, other, key=lambda d: d.relative)
        return Difference(base.error, base.scale, min(agreements, default=None))


def difference_of(reference: Any, result: Any, *, argmax: bool) -> Difference:
    """Compare ``result`` with ``reference``, which are tensors of any dtype or plain values, in float64.

    Equal infinities and NaNs in both count as equal; other values that are not finite, and differing shapes, are an
    infinite error. Entries that both fill with the largest number of a float type (forbidden tokens) say nothing about
    the size of the others. ``argmax`` asks for the share of equal argmax as well.
    """
    if not isinstance(reference, Tensor) or not isinstance(result, Tensor):
        same = not isinstance(reference, Tensor) and not isinstance(result, Tensor) and reference == result
        return Difference(0.0 if same else math.inf, 1.0, None)
    if reference.shape != result.shape:
        return Difference(math.inf, 1.0, None)
    a, b = wide(reference), wide(result)
    equal = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(equal, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    scale = torch.where(a.isfinite() & ~(equal & is_fill(a)), a.abs(), 0.0)
    agreement = (a.argmax(-1) == b.argmax(-1)).double().mean() if argmax and a.ndim >= 2 and a.numel() else None
    return Difference(
        float(error.max()) if error.numel() else 0.0,
        float(scale.max()) if scale.numel() else 0.0,
        None if agreement is None else float(agreement),
    )


def has_finite(x: Any) -> bool:
    """Return whether any value is finite, or there is none; else a comparison with ``x`` says nothing."""
    return not isinstance(x, Tensor) or not x.numel() or bool(x.isfinite().any())


def is_fill(x: Tensor) -> Tensor:
    """Return where ``x`` holds the largest number of a float type, which fills what is forbidden."""
    return torch.isin(x.abs(), x.new_tensor([torch.finfo(dtype).max for dtype in BOUNDS]))


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float64 on the CPU, a complex tensor with an axis of its two parts."""
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.detach().to("cpu", torch.float64)


@dataclass(frozen=True)
class OutputCheck:
    """What was found about one output, at the worst of all steps.

    Attributes:
        name: what the output is called.
        shape: its shape in the first draw.
        float64: the comparison of the programs lifted to float64.
        native: the comparison of the programs in the model's dtype.
        noise: the original's own rounding, which is the relative error of its native result against its float64 one.
        bound64: the largest relative error allowed in float64.
        bound_native: the largest relative error allowed in the model's dtype.
        mismatch: says which shape or dtype is wrong, else ''.
        vectors: the largest error in float64 relative to the size of its own row and column
            (see :mod:`spinpass.certificate.vectors`).
        compared: whether any value of it was finite in the original, or it has no values; else nothing was compared.
    """

    name: str
    shape: tuple[int, ...]
    float64: Difference
    native: Difference
    noise: float
    bound64: float
    bound_native: float
    mismatch: str = ""
    vectors: float = 0.0
    compared: bool = True

    @staticmethod
    def from_dict(data: Fields) -> OutputCheck:
        """Read what a certificate has written. Raises ConfigError where a field is missing or wrong."""
        return OutputCheck(
            name=data.text("name"),
            shape=data.counts("shape"),
            float64=Difference.from_dict(data.inner("float64")),
            native=Difference.from_dict(data.inner("native")),
            noise=data.number("noise"),
            bound64=data.number("bound64"),
            bound_native=data.number("bound_native"),
            mismatch=data.text("mismatch"),
            vectors=data.number("vectors"),
            compared=data.flag("compared"),
        )

    @property
    def failure(self) -> str:
        """Return why the output fails, or '' where it does not."""
        if self.mismatch:
            return self.mismatch
        if not self.compared:
            return "not certified: it holds no finite value in any draw; give inputs for which it does"
        if not self.float64.relative <= self.bound64:
            return f"relative error {self.float64.relative:.2e} in float64, bound {self.bound64:.1e}"
        if not self.vectors <= self.bound64:
            return (
                f"relative error {self.vectors:.2e} in float64, bound {self.bound64:.1e}, against the values around it"
            )
        if not self.native.relative <= self.bound_native:
            return f"relative error {self.native.relative:.2e} in the model's dtype, bound {self.bound_native:.1e}"
        return ""


@dataclass(frozen=True, repr=False)
class Certificate:
    """The result of comparing two programs. ``print(certificate)`` shows a table, a notebook one in HTML.

    Attributes:
        outputs: what was found about every output and every state that a program changed.
        dtype: the float type whose rounding limits the original.
        exact: whether the float64 comparison used the changed constants before their cast to the stored type, so that
            it judges the transformation alone.
        constants: says so in words.
        inputs: a description of each input that both programs were given.
        closed_loop_steps: how many further steps were run in which each program was fed its own returned state.
        closed_loop: says what was carried, or why there was no loop.
        draws: how many sets of inputs were run.
        coverage: what none of the runs reached, a line for each; see :mod:`spinpass.certificate.coverage`.
    """

    outputs: tuple[OutputCheck, ...]
    dtype: torch.dtype
    exact: bool
    constants: str
    inputs: tuple[str, ...]
    closed_loop_steps: int
    closed_loop: str
    draws: int = 1
    coverage: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether every output keeps to its bounds."""
        return all(not output.failure for output in self.outputs)

    @property
    def worst(self) -> OutputCheck:
        """Return the output with the largest relative error, of those that fail if any does."""
        return max(self.outputs, key=lambda o: (bool(o.failure), o.float64.relative, o.native.relative))

    @property
    def verdict(self) -> str:
        """Say in one line whether the programs are equivalent, and how far apart they are."""
        if not self.outputs:
            return "equivalent: the programs have no outputs"
        if not self.ok:
            return f"NOT equivalent: {self.worst.name}: {self.worst.failure}"
        exact = max(o.float64.relative for o in self.outputs)
        native = max(o.native.relative for o in self.outputs)
        return f"equivalent: relative error at most {exact:.1e} in float64, {native:.1e} in {dtype_name(self.dtype)}"

    def raise_if_failed(self) -> None:
        """Raise a VerificationError that names the worst output, unless :attr:`ok`."""
        if not self.ok:
            failed = sum(bool(o.failure) for o in self.outputs)
            others = f" ({failed} of {len(self.outputs)} outputs fail)" if failed > 1 else ""
            raise VerificationError(f"the programs are not equivalent: {self.worst.name}: {self.worst.failure}{others}")

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as values that JSON can hold; numbers that are not finite become texts."""
        outputs = [plain_numbers(asdict(o) | {"ok": not o.failure, "failure": o.failure}) for o in self.outputs]
        fields = {
            "ok": self.ok,
            "verdict": self.verdict,
            "dtype": dtype_name(self.dtype),
            "exact": self.exact,
            "constants": self.constants,
            "inputs": list(self.inputs),
            "closed_loop_steps": self.closed_loop_steps,
            "closed_loop": self.closed_loop,
            "draws": self.draws,
            "coverage": list(self.coverage),
            "outputs": outputs,
        }
        return titled("certificate", _VERSION, fields)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Certificate:
        """Return the certificate that :meth:`to_dict` has written.

        Raises ConfigError: it is none, one of another version, incomplete, or says what its numbers do not.
        """
        fields = Fields.of(data, "certificate", _VERSION)
        found = Certificate(
            outputs=tuple(map(OutputCheck.from_dict, fields.each("outputs"))),
            dtype=named_dtype(fields),
            exact=fields.flag("exact"),
            constants=fields.text("constants"),
            inputs=fields.texts("inputs"),
            closed_loop_steps=fields.count("closed_loop_steps"),
            closed_loop=fields.text("closed_loop"),
            draws=fields.count("draws"),
            coverage=fields.texts("coverage"),
        )
        check_told("certificate", data, found.to_dict())
        return found

    def __repr__(self) -> str:
        return f"<Certificate: {self.verdict}>"

    def __str__(self) -> str:
        shown, hidden = self._shown()
        return "\n".join([self.verdict, *columns([_HEADER, *map(_cells, shown)]), *self._notes(hidden)])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the verdict, the outputs and how they were compared."""
        shown, hidden = self._shown()
        head, rows = ("output", "shape", "", *_HEADER[2:-1]), []
        for name, shape, *numbers, verdict in map(_cells, shown):
            rows.append((name, shape, verdict, *numbers))
        return notebook_table(self.verdict, head, rows, numbers=len(head) - 3, notes=self._notes(hidden))

    def _shown(self) -> tuple[list[OutputCheck], list[OutputCheck]]:
        """Return the outputs that a table shows, those that fail first, and the others."""
        shown = sorted(self.outputs, key=lambda o: (not o.failure, o.float64.argmax is None))[:_ROWS]
        return shown, [o for o in self.outputs if o not in shown]

    def _notes(self, hidden: list[OutputCheck]) -> list[str]:
        """Return what stands below a table."""
        dtype, lines = dtype_name(self.dtype), []
        if hidden:
            error = max(o.float64.relative for o in hidden)
            native = max(o.native.relative for o in hidden)
            lines.append(f"and {len(hidden)} more outputs, at most {error:.1e} in float64, {native:.1e} in {dtype}")
        lines.append(f"f64: both programs lifted throughout; {self.constants}")
        lines.append(f"native: {dtype}; noise: the original in {dtype} against itself in float64")
        lines.append(f"closed loop: {self.closed_loop}")
        lines.append(f"inputs: {_shortened(self.inputs)}; {self.draws} draw{'s' * (self.draws != 1)}")
        return [*lines, f"not reached: {_shortened(self.coverage)}"] if self.coverage else lines


_HEADER = ("output", "shape", "max|ref|", "f64 error", "f64 rel", "argmax", "native error", "native rel", "bound",
           "noise", "argmax", "")  # fmt: skip


def _cells(o: OutputCheck) -> tuple[str, ...]:
    exact, native = o.float64, o.native
    return (o.name, "x".join(map(str, o.shape)), f"{exact.scale:.3g}", f"{exact.error:.1e}", f"{exact.relative:.1e}",
            _share(exact.argmax), f"{native.error:.1e}", f"{native.relative:.1e}", f"{o.bound_native:.1e}",
            f"{o.noise:.1e}", _share(native.argmax), "FAIL" if o.failure else "ok")  # fmt: skip


def _share(agreement: float | None) -> str:
    return "-" if agreement is None else f"{agreement:.1%}"


def _shortened(items: tuple[str, ...], limit: int = 6) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a dtype is called in a document, for example ``float32``."""
    return str(dtype).removeprefix("torch.")


def named_dtype(fields: Fields) -> torch.dtype:
    """Read the field ``dtype`` of a document. Raises ConfigError where it names none."""
    names = {dtype_name(each): each for each in BOUNDS}
    return names[fields.text("dtype", sorted(names))]


def plain_numbers(x: Any) -> Any:
    """Return what JSON can hold of values: lists for tuples, texts for numbers that are not finite."""
    if isinstance(x, dict):
        return {key: plain_numbers(v) for key, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain_numbers(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x

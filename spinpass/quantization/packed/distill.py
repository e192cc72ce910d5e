"""distill:  a quantized program, the original, inputs  ->  the same codes with better scales.

    min over s  Σ KL( softmax f(x) ‖ softmax f̂_s(x) ),   Ŵ = (q − z)·s with q and z held fixed

over the tokens of the calibration inputs: every scale learns what the rounding of all other layers has done. The
gradient of a scale is that of the packed operator (:mod:`spinpass.operators.packed_linear`). Scales alone are trained
in PEQA (Kim et al., arXiv 2305.14152) and in the second phase of EfficientQAT (Chen et al., arXiv 2407.11062), both on
text. Here the original program teaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.execution import constants, log_probabilities
from spinpass.graph import storage_key, with_other_values
from spinpass.progress import Progress, Tick

from ..report import Distillation, Quantized, QuantizedWeight
from . import training  # noqa: F401  (registers the gradients of roundings)
from .program import pack, scales_name

RATE = 1e-3
"""Of Adam on the logarithms of the scales. Three times as much fits the calibration text and loses on any other."""

_SEED = 0
_ROWS = 64  # tokens whose predictions are compared at a time
_HELD_OUT = 16  # one input of so many decides whether the trained scales are kept


def distilled(
    program: ExportedProgram,
    quantized: Quantized,
    inputs: Sequence[object],
    *,
    epochs: int = 1,
    rate: float = RATE,
    progress: Progress | None = None,
) -> Quantized:
    """Train the scales of ``quantized``. Neither program is changed.

    Weights that cannot be packed keep their scales. The errors in the report are those before training. It takes,
    beside the packed program, the memory of one input's backward pass.

    Args:
        program: the original, whose first output are logits (…, vocabulary).
        quantized: what was made of it.
        inputs: as for :func:`spinpass.quantization.quantize`. One of sixteen, spread over them, is held out.
        epochs: how many times to go through the other inputs, in an order drawn at random, with one step of Adam each.
        rate: of Adam on the logarithms of the scales. It falls to nothing along half a cosine.
        progress: called with (inputs done, all inputs that are run).

    Returns:
        The program and report with trained scales, or ``quantized`` where these do not lower the divergence on the
        inputs held out; the report says which, and by how much.

    Raises:
        ConfigError: no weight can be packed, there are no inputs or they do not fit, or the first output is no logits.
    """
    if not inputs:
        raise ConfigError("distilling needs calibration inputs; give some")
    student = _Student(pack(quantized).program, quantized)
    names, report = _names(quantized.program, student.moves), quantized.report
    emptied = _emptied(quantized.program, names)
    del quantized  # its weights are made again of the codes, which are kept
    shown, held_out = _parted(inputs)
    tick = _counter(progress, epochs * len(shown) + 2 * len(held_out))
    before = student.divergence(program, held_out, tick)
    optimizer = torch.optim.Adam(student.moves.values(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(shown))
    generator = torch.Generator("cpu").manual_seed(_SEED)
    for _ in range(epochs):
        for index in torch.randperm(len(shown), generator=generator, device="cpu").tolist():
            optimizer.zero_grad()
            torch.autograd.backward(student.loss(program, shown[index]))
            optimizer.step()
            schedule.step()
            tick()
    after = student.divergence(program, held_out, tick)
    done = Distillation(before, after, len(held_out))
    weights = dict(report.weights)
    for name, trained in student.scales().items() if done.kept else ():
        codes = replace(weights[name].codes, scales=trained.detach().T.contiguous().to(weights[name].codes.q.device))
        narrow = weights[name].scheme.scales
        weights[name] = replace(weights[name], codes=codes.in_steps_of(emptied.state_dict[name].dtype, narrow))
    filled = _filled(emptied, weights, names)
    return Quantized(filled, replace(report, weights=weights, distillation=done))


def _parted(inputs: Sequence[object]) -> tuple[list[object], list[object]]:
    """Return those to train on and those held out, the last of every sixteen: each part of a text is in both."""
    count = max(1, len(inputs) // _HELD_OUT)
    held_out = {(k + 1) * len(inputs) // count - 1 for k in range(count)}
    shown = [each for k, each in enumerate(inputs) if k not in held_out]
    return shown or list(inputs), [inputs[k] for k in sorted(held_out)]


def _counter(progress: Progress | None, steps: int) -> Tick:
    """Tells ``progress`` of one more step whenever it is called."""
    done = itertools.count(1)
    return lambda: None if progress is None else progress(next(done), steps)


class _Divergence(torch.autograd.Function):
    """The mean over rows of Σ p (log p − log p̂), for log p̂ and log p (rows, vocabulary):  d/d log p̂ = −p / rows.

    It takes no memory of a vocabulary's size beside the two, and log p is overwritten with p.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=found.device)
        for q, p in zip(torch.split(found, _ROWS), torch.split(wanted, _ROWS), strict=True):
            entropy = p - q
            total += (p.exp_() * entropy).sum(dtype=torch.float64)
        ctx.save_for_backward(wanted)
        return (total / len(found)).to(found.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return p.mul(-gradient / len(p)), None


class _Student:
    """A packed program with scales s·e^θ, so that they stay positive. ``moves`` has θ (groups, out) by weight name."""

    def __init__(self, packed: ExportedProgram, quantized: Quantized) -> None:
        self.packed = packed
        stored = {name: packed.state_dict.get(scales_name(name)) for name in quantized.report.weights}
        self._start = {name: t.detach() for name, t in stored.items() if t is not None}
        self.moves = {name: torch.zeros_like(t).requires_grad_() for name, t in self._start.items()}
        self._fixed = {name: t.detach() for name, t in constants(packed).items() if isinstance(t, Tensor)}
        self._placed = {spec.target: spec.arg.name for spec in packed.graph_signature.input_specs}

    def scales(self) -> dict[str, Tensor]:
        """The scales s·e^θ (groups, out) by weight name."""
        return {name: start * self.moves[name].exp() for name, start in self._start.items()}

    def loss(self, teacher: ExportedProgram, inputs: object, *, gradients: bool = True) -> Tensor:
        """The mean over tokens of KL(teacher ‖ student), in nats."""
        wanted = log_probabilities(teacher, inputs, {})
        trained = {self._placed[scales_name(name)]: s for name, s in self.scales().items()}
        found = log_probabilities(self.packed, inputs, self._fixed | trained, gradients=gradients)
        divergence: Tensor = _Divergence.apply(found, wanted)  # type: ignore[no-untyped-call]
        return divergence

    def divergence(self, teacher: ExportedProgram, inputs: Sequence[object], tick: Tick) -> float:
        """The mean of :meth:`loss` over inputs, in nats per token."""
        total = 0.0
        for each in inputs:
            total += float(self.loss(teacher, each, gradients=False))
            tick()
        return total / len(inputs)


def _names(program: ExportedProgram, weights: Iterable[str]) -> dict[str, list[str]]:
    """By name of a weight all names under which the program has it."""
    at: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in program.state_dict.items():
        at.setdefault(storage_key(tensor), []).append(name)
    return {name: at[storage_key(program.state_dict[name])] for name in weights}


def _emptied(program: ExportedProgram, names: Mapping[str, Sequence[str]]) -> ExportedProgram:
    """The program with weights that take no memory: zeros of their shape and dtype."""
    empty: dict[str, Tensor] = {}
    for name, each in names.items():
        tensor = program.state_dict[name]
        empty |= dict.fromkeys(each, torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape))
    return with_other_values(program, empty)


def _filled(
    program: ExportedProgram, weights: Mapping[str, QuantizedWeight], names: Mapping[str, Sequence[str]]
) -> ExportedProgram:
    """The program with what the codes of weights stand for, in the layouts and dtypes of its constants."""
    values: dict[str, Tensor] = {}
    for name, each in names.items():
        stored = program.state_dict[name]
        whole = weights[name].codes.on(stored.device).dequantized().movedim(-1, weights[name].dim).contiguous()
        values |= dict.fromkeys(each, whole.to(stored.dtype))
    return with_other_values(program, values)

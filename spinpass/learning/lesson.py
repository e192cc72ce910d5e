"""A lesson: the program that learns, the one that teaches, and the windows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.execution import flat_inputs, log_probabilities
from spinpass.graph import Handle
from spinpass.progress import Tick

from .divergence import divergence

_ROWS, _PIECE = 16, 256  # rows of a constant, spread over it, and values of each
_HELD_OUT = 16  # one input of so many decides whether what was learned is kept


@dataclass(frozen=True)
class Lesson:
    """Who learns what from whom.

    Args:
        student: a program whose first output are logits (…, vocabulary), some of whose constants are learned.
        teacher: the original, of the same inputs and outputs.
        shown: inputs to learn from.
        held_out: inputs that decide, by which nothing is learned.
    """

    student: ExportedProgram
    teacher: ExportedProgram
    shown: Sequence[object]
    held_out: Sequence[object]

    @property
    def described(self) -> str:
        """The hash of all windows, and of a piece of every constant of both programs: what a run depends on."""
        digest = hashlib.sha256()
        for inputs in (*self.shown, *self.held_out):
            for name, each in flat_inputs(self.student, inputs).items():
                digest.update(name.encode() + (_bytes(each) if isinstance(each, Tensor) else repr(each).encode()))
        for program in (self.student, self.teacher):
            for name, tensor in program.state_dict.items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                if not isinstance(tensor, Handle):  # reading one may cost all that it is computed of
                    digest.update(_bytes(_piece(tensor) if tensor.ndim else tensor))
        return digest.hexdigest()

    def loss(self, inputs: object, constants: Mapping[str, Tensor], *, gradients: bool = True) -> Tensor:
        """The mean over tokens of KL(teacher ‖ student), in nats, for constants of the student by placeholder name."""
        with torch.no_grad():
            wanted = log_probabilities(self.teacher, inputs, {})
        found = log_probabilities(self.student, inputs, constants, gradients=gradients)
        return divergence(found, wanted)

    def judged(self, constants: Mapping[str, Tensor], tick: Tick) -> float:
        """The mean of :meth:`loss` over the inputs held out."""
        total = 0.0
        for each in self.held_out:
            total += float(self.loss(each, constants, gradients=False))
            tick()
        return total / len(self.held_out)


def _piece(tensor: Tensor) -> Tensor:
    """Return some values of a constant: of its first row, its last one, and some between."""
    count = min(_ROWS, len(tensor))
    rows = [tensor[(len(tensor) - 1) * k // max(1, count - 1)].reshape(-1) for k in range(count)]
    return torch.cat([torch.cat([row[:_PIECE], row[-_PIECE:]]) for row in rows]) if rows else tensor


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def parted(inputs: Sequence[object]) -> tuple[list[object], list[object]]:
    """Return those to learn from and those held out, the last of every sixteen: each part of a text is in both.

    Raises ConfigError: there are fewer than two.
    """
    if len(inputs) < 2:
        raise ConfigError("learning needs two windows at least, one to learn from and one to judge by; give more text")
    count = max(1, len(inputs) // _HELD_OUT)
    held_out = {(k + 1) * len(inputs) // count - 1 for k in range(count)}
    shown = [each for k, each in enumerate(inputs) if k not in held_out]
    return shown, [inputs[k] for k in sorted(held_out)]

"""A model file opened and run in a process of its own, as a user would: texts go there, tokens and logits come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .elsewhere import Elsewhere

Turns = Sequence[Sequence[Sequence[int]]]
"""By turn, the tokens of every row that are read before the model goes on. Only one row has several turns."""


@dataclass(frozen=True)
class Answer:
    """What a runtime made of one case.

    Args:
        tokens: by row, all of them: those given and those chosen.
        chosen: by row, the places of those chosen.
        logits: by row, float32 (chosen, vocabulary), what each was chosen from; None where the runtime does not say.
    """

    tokens: list[list[int]]
    chosen: list[list[int]]
    logits: list[Tensor] | None

    @property
    def count(self) -> int:
        """How many tokens were chosen."""
        return sum(map(len, self.chosen))


def continued(
    path: Path, cases: Mapping[str, Mapping[str, Turns]], new: int, threads: int
) -> dict[str, dict[str, Answer]]:
    """Let runtimes continue texts greedily, past end tokens, all in one other process.

    Args:
        path: the folder, or a model in it.
        cases: by runtime, the turns of each case by name. The runtimes are ``onnxruntime`` (step by step), ``OrtModel``
            (``generate``; both pad batches on the left), ``genai`` (which pads on the right and chooses no end tokens),
            ``openvino`` and ``openvino, unrounded`` (which is told not to round), and ``executorch``.
        new: how many tokens follow each turn.
        threads: how many of the CPU.

    Raises:
        ExportError, NoKernelError, VerificationError, ConfigError: as the runtime's own classes here; ExportError also
            where the process dies.
    """
    plain = {
        runtime: {name: [[list(row) for row in rows] for rows in turns] for name, turns in each.items()}
        for runtime, each in cases.items()
    }
    with Elsewhere() as process:
        found = process.ask({"do": "continue", "path": str(path), "cases": plain, "new": new, "threads": threads})
    return {runtime: {name: Answer(*answer) for name, answer in each.items()} for runtime, each in found.items()}


def outputs(path: Path, inputs: Sequence[Tensor], threads: int) -> dict[str, Tensor]:
    """Run a file that is no decoder in ONNX Runtime, or that of a folder in OpenVINO, and return its outputs by name.

    Raises:
        ExportError: the runtime cannot load or run it, or dies. VerificationError: see :func:`continued`.
    """
    with Elsewhere() as process:
        request = {"do": "run once", "path": str(path), "inputs": list(inputs), "threads": threads}
        found: dict[str, Tensor] = process.ask(request)
    return found

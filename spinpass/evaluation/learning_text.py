"""What is learned from and judged by: windows of the calibration text, and of another text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass.learning import Learning

from .calibration import CALIBRATION_LENGTH, Tokenize, calibration_inputs
from .scoring import ProgramScorer
from .texts import read_text, windows_between

_MOST = 4096  # windows of a text, a million tokens
_JUDGED = 8  # windows of another text
_SHARE = 2  # parts of a calibration window: a backward pass holds what lies between all layers


@dataclass(frozen=True)
class LearningText:
    """Inputs of a program: ``shown`` are learned from, ``held_out`` decide; None where some of the others do."""

    shown: list[dict[str, Any]]
    held_out: list[dict[str, Any]] | None


def learning_text(
    program: ExportedProgram,
    tokenize: Tokenize,
    path: Path,
    learning: Learning | None,
    windows: int,
    longest: int,
    *,
    judge: Path | None = None,
) -> LearningText:
    """Cut what a program learns from. Where no more than scales are learned, which little text is enough for, it is as
    many tokens as calibrate; elsewhere all of the text, and another text decides.

    Args:
        program: it reads token ids.
        tokenize: text to token ids.
        path: of the text.
        learning: what is learned; None for what needs gradients and learns nothing.
        windows: how many calibrate.
        longest: tokens that the model has positions for.
        judge: the text that decides; None for Python's documentation.

    Raises ConfigError: the text cannot be read, or is too short.
    """
    length = min(CALIBRATION_LENGTH, longest) // _SHARE
    if learning is None or learning.kinds == ("scales",):
        return LearningText(calibration_inputs(program, tokenize, path, length, _SHARE * windows), None)
    most = max(1, min(_MOST, len(tokenize(read_text(path))) // length))
    scorer = ProgramScorer(program)
    judged = windows_between(tokenize(read_text(judge)), length, _JUDGED)
    return LearningText(
        calibration_inputs(program, tokenize, path, length, most), [scorer.inputs(ids) for ids in judged]
    )

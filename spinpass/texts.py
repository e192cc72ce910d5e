"""Texts from files, and as a program's inputs to calibrate on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from torch.export import ExportedProgram

from .errors import ConfigError
from .evaluation import windows
from .quantization import QuantizationConfig
from .scoring import ProgramScorer

Tokenize = Callable[[str], list[int]]
SAMPLES = 16  # windows to calibrate on
LENGTH = 512  # tokens of each


def read_text(path: Path | None) -> str:
    """The file, or Python's help texts where none is named. ConfigError where it is not UTF-8 text."""
    if path is None:
        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable UTF-8 text: {error}") from error


def check_calibration(scheme: str, path: Path | None) -> None:
    """ConfigError where the scheme cannot be read, or needs a text and there is none."""
    if QuantizationConfig.parse(scheme).needs_calibration and path is None:
        raise ConfigError(f"{scheme} needs a text to calibrate on: add --calibration FILE, or -rtn")


def calibration_inputs(
    program: ExportedProgram, tokenize: Tokenize, path: Path | None, length: int = LENGTH, samples: int = SAMPLES
) -> list[dict[str, Any]]:
    """Windows of ``length`` tokens, or as many as the program takes, spread over the text, as its inputs; none without
    a text.

    Raises ConfigError: a text that cannot be read, or is shorter than one window.
    """
    if path is None:
        return []
    scorer, ids = ProgramScorer(program), tokenize(read_text(path))
    length = min(length, scorer.longest or length)
    count = max(1, min(samples, len(ids) // length))
    return [scorer.inputs(window) for window in windows(ids, length, count)]

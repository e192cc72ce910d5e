"""Windows of a text to calibrate on, as tokens and as a program's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.quantization import QuantizationConfig

from .scoring import ProgramScorer
from .texts import read_text, windows

Tokenize = Callable[[str], list[int]]
CALIBRATION_WINDOWS = 16  # windows to calibrate on
CALIBRATION_LENGTH = 512  # tokens of each
SHIPPED_TEXT = Path(__file__).with_name("calibration.txt")
"""Stories, articles, dialogues, documentation and code in seventeen languages, written for this package."""
SELF = "self"
"""In place of a text: what the model itself writes."""


def needs_text(scheme: QuantizationConfig | str) -> bool:
    """Whether a scheme calibrates. Raises ConfigError where it cannot be read."""
    return (QuantizationConfig.parse(scheme) if isinstance(scheme, str) else scheme).needs_calibration


def named_dataset(calibration: str | Path | None) -> str:
    """The dataset that is named in place of a file, as :func:`.read_dataset` takes it; empty where a file is, or
    :data:`SELF`. A name with a suffix or from the root on is a file's, though none is there."""
    if not isinstance(calibration, str) or calibration == SELF:
        return ""
    path = Path(calibration)
    return "" if path.exists() or path.suffix or path.is_absolute() else calibration


def check_windows(count: int | None, path: str | Path | None = None, length: int | None = None) -> None:
    """Raise ConfigError where a count was given that is no number of calibration windows, or is given without a text to
    cut them from, or where ``length`` is none of a window."""
    if count is not None and count < 1:
        raise ConfigError(f"{count} windows to calibrate on: choose 1 or more")
    if count is not None and path is None:
        raise ConfigError(f"--samples {count} are windows of a text to calibrate on: add --calibration FILE")
    if length is not None and length < 2:
        raise ConfigError(
            f"windows of {length} tokens: at least two are needed, one to predict the other by: choose more"
        )


def calibration_inputs(
    program: ExportedProgram,
    tokenize: Tokenize,
    path: Path | None,
    length: int = CALIBRATION_LENGTH,
    count: int | None = None,
) -> list[dict[str, Any]]:
    """``count`` windows of ``length`` tokens, spread over the text, as inputs of the program by name; none without a
    text. Windows are shorter where the program takes fewer tokens at once.

    Raises ConfigError: the text cannot be read, or is too short.
    """
    if path is None:
        return []
    scorer = ProgramScorer(program)
    length = min(length, scorer.longest or length)
    return [scorer.inputs(window) for window in calibration_windows(tokenize, path, length, count)]


def calibration_windows(
    tokenize: Tokenize, path: Path, length: int = CALIBRATION_LENGTH, count: int | None = None
) -> list[list[int]]:
    """The token ids of ``count`` windows of a text; without a count as many as it holds, at most
    :data:`CALIBRATION_WINDOWS`. Raises ConfigError as :func:`calibration_inputs`."""
    return cut_windows(tokenize(read_text(path)), length, count)


def cut_windows(ids: list[int], length: int = CALIBRATION_LENGTH, count: int | None = None) -> list[list[int]]:
    """The windows of :func:`calibration_windows`, of the tokens of a text."""
    if count is None:
        count = max(1, min(CALIBRATION_WINDOWS, len(ids) // length))
    return [list(window) for window in windows(ids, length, count)]

"""Texts from files, and as a program's inputs to calibrate on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from torch.export import ExportedProgram

from spinpass.errors import ConfigError
from spinpass.quantization import QuantizationConfig

from .comparison import windows
from .scoring import ProgramScorer

Tokenize = Callable[[str], list[int]]
SAMPLES = 16  # windows to calibrate on
LENGTH = 512  # tokens of each
_ENOUGH = 4_000_000  # characters of a dataset


def read_text(path: Path | None) -> str:
    """The file, or Python's help texts where none is named. ConfigError where it is not UTF-8 text."""
    if path is None:
        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable UTF-8 text: {error}") from error


def read_dataset(name: str) -> str:
    """The documents of a dataset, ``NAME[:CONFIG[:SPLIT]]`` as the package datasets knows it, a hub name or a folder:
    the first few million characters of its column ``text``, or of the only one that holds strings. The split is
    ``test`` where none is named.

    Raises ConfigError: the package is missing, there is no such dataset or split, or no column of text.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(f"--dataset needs the package {error.name}: pip install datasets, or use --text") from error
    where, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(where, config or None, split=split or "test", streaming=True)
        columns = _string_columns(rows)
        if "text" not in columns and len(columns) != 1:
            raise ConfigError(f"the dataset {name} has no column 'text'; of strings it has {columns or 'none'}")
        column = "text" if "text" in columns else columns[0]
        return _joined(row[column] for row in rows)
    except ConfigError:
        raise
    except Exception as error:  # files, hub, builders: no common base below Exception
        raise ConfigError(f"the dataset {name} cannot be read: {error}") from error


def _string_columns(rows: Any) -> list[str]:
    """By the dataset's types, or by its first row where a stream does not know them before."""
    if rows.features:
        strings = ("string", "large_string")
        return [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in strings]
    return [name for name, value in next(iter(rows), {}).items() if isinstance(value, str)]


def _joined(documents: Iterable[str]) -> str:
    found, length = [], 0
    for document in documents:
        found.append(document)
        length += len(document)
        if length > _ENOUGH:
            break
    return "\n\n".join(found)


def check_calibration(scheme: str, path: Path | None) -> None:
    """ConfigError where the scheme cannot be read, or needs a text and there is none."""
    if QuantizationConfig.parse(scheme).needs_calibration and path is None:
        raise ConfigError(f"{scheme} needs a text to calibrate on: add --calibration FILE, or -rtn")


def check_samples(samples: int) -> None:
    """ConfigError where it is no number of windows."""
    if samples < 1:
        raise ConfigError(f"{samples} samples to calibrate on: choose 1 or more")


def calibration_inputs(
    program: ExportedProgram, tokenize: Tokenize, path: Path | None, length: int = LENGTH, samples: int = SAMPLES
) -> list[dict[str, Any]]:
    """Windows of ``length`` tokens spread over the text, as inputs of the program; none without a text.

    Raises ConfigError: a text that cannot be read, or is shorter than one window.
    """
    if path is None:
        return []
    scorer = ProgramScorer(program)
    length = min(length, scorer.longest or length)
    return [scorer.inputs(window) for window in calibration_windows(tokenize, path, length, samples)]


def calibration_windows(
    tokenize: Tokenize, path: Path, length: int = LENGTH, samples: int = SAMPLES
) -> list[list[int]]:
    """The tokens of such windows. Raises ConfigError as :func:`calibration_inputs`."""
    ids = tokenize(read_text(path))
    return [list(window) for window in windows(ids, length, max(1, min(samples, len(ids) // length)))]

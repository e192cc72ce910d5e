"""ONNX Runtime GenAI behind tokens: it reads a folder by its ``genai_config.json`` and keeps the cache itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spinpass.errors import ExportError, first_line
from spinpass.formats import check_opened, read_object

GENAI_CONFIG = "genai_config.json"


def special_tokens(folder: str | Path) -> tuple[int, tuple[int, ...]]:
    """Return the padding and the end tokens that ``genai_config.json`` names. Raises ExportError where it does not."""
    path = Path(folder) / GENAI_CONFIG
    try:
        model = read_object(path)["model"]
        ends = model["eos_token_id"]
        return int(model["pad_token_id"]), tuple(ends) if isinstance(ends, list) else (ends,)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} names no padding and end tokens: {first_line(error)}") from error


def genai_tokens(folder: str | Path, text: str) -> list[int]:
    """Return the tokens of a text by GenAI's own tokenizer, in a process of its own: it may not survive the folder's.

    Raises ExportError where it cannot read that.
    """
    command = [sys.executable, "-I", "-c", _TOKENS, str(folder), text, *map(os.path.abspath, sys.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()
    if done.returncode:
        raise ExportError(said[-1] if said else f"it ends with {done.returncode}")
    return [int(token) for token in done.stdout.split()]


_TOKENS = """
import sys
folder, text, *sys.path = sys.argv[1:]
import onnxruntime_genai as og
print(*og.Tokenizer(og.Model(folder)).encode(text))
"""


class GenaiModel:
    """A folder that GenAI has loaded.

    Args:
        folder: one with ``model.onnx`` and ``genai_config.json``.

    Attributes:
        pad: the token that fills up shorter rows of a batch, on the right. GenAI takes no such token for text.

    Raises:
        ExportError: GenAI is not installed, or cannot load the folder.
        VerificationError: its files are not those that ``spinpass.json`` lists.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import onnxruntime_genai as og
        except ImportError as error:
            raise ExportError(f"{first_line(error)}: pip install onnxruntime-genai") from error
        self._og = og
        check_opened(Path(folder) / "model.onnx")
        self.pad, _ = special_tokens(folder)
        try:
            self._model = og.Model(str(folder))
        except Exception as error:  # GenAI's exceptions have no common base below Exception
            raise ExportError(f"ONNX Runtime GenAI {og.__version__} cannot load the folder: {error}") from error

    def continued(self, turns: Sequence[Sequence[Sequence[int]]], new: int) -> list[list[int]]:
        """Continue the rows of a first turn by ``new`` tokens each, the likeliest that is no end token, then read the
        next turn, and so on.

        Between two turns the last two tokens are taken back and read again in front of the new ones: GenAI 0.18 never
        reads the token that it chose last.

        Args:
            turns: by turn, the tokens of every row. Only one row can have several turns.
            new: how many tokens follow each turn.

        Returns:
            By row, all tokens: those given and those chosen.

        Raises:
            ExportError: GenAI fails.
        """
        first = turns[0]
        longest = max(map(len, first))
        length = longest + sum(len(rows[0]) for rows in turns[1:]) + new * len(turns)
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(first))
        try:
            generator = self._og.Generator(self._model, parameters)
            padded = [[*row, *[self.pad] * (longest - len(row))] for row in first]
            generator.append_tokens(np.array(padded, np.int32) if len(first) > 1 else np.array(padded[0], np.int32))
            self._generate(generator, new)
            for (row,) in turns[1:]:
                before = self._sequence(generator, 0)
                generator.rewind_to(len(before) - 2)
                generator.append_tokens(np.array([*before[-2:], *row], np.int32))
                self._generate(generator, new)
            found = [self._sequence(generator, row) for row in range(len(first))]
        except Exception as error:  # see above
            raise ExportError(f"ONNX Runtime GenAI {self._og.__version__} cannot run the folder: {error}") from error
        return [[*row, *tokens[longest:]] for row, tokens in zip(first, found)]

    @staticmethod
    def _generate(generator: Any, new: int) -> None:
        for _ in range(new):
            generator.generate_next_token()

    @staticmethod
    def _sequence(generator: Any, row: int) -> list[int]:
        return [int(token) for token in generator.get_sequence(row)]

"""The model that every tool is given: off-grid weights as a GGUF file, and the same as a folder of transformers."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.consumers.expected import original_model
from benchmarks.offgrid import write
from spinpass import evaluation
from spinpass.evaluation import ProgramScorer, read_text, token_ids
from spinpass.loading import load_model

PIECES = 64
_LONGER = 1.1  # of a calibration window, so that its text has enough tokens when it is cut into tokens again


@dataclass(frozen=True)
class Source:
    """The weights and the text that a tool may calibrate on.

    ``gguf``: the file; ``folder``: what transformers loads, tokenizer included; ``text``: one UTF-8 text; ``windows``:
    a JSON list of pieces of it, each of at least as many tokens as a calibration window has.
    """

    gguf: Path
    folder: Path
    text: Path
    windows: Path

    @cached_property
    def tokenizer(self) -> Any:
        """That of the folder."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return token_ids(self.tokenizer)(text)

    @cached_property
    def weights(self) -> int:
        """How many there are, tied ones counted once."""
        return sum(math.prod(shape) for shape in _shapes(self.folder / "model.safetensors"))

    @cached_property
    def digest(self) -> str:
        """Twelve digits that change with the file."""
        hashed = hashlib.sha256()
        with self.gguf.open("rb") as opened:
            while piece := opened.read(1 << 24):
                hashed.update(piece)
        return hashed.hexdigest()[:12]


@dataclass(frozen=True)
class Float:
    """The model in float32, whose logits are kept on the disk: every row is compared with them."""

    source: Source
    folder: Path

    @cached_property
    def _scorer(self) -> ProgramScorer:
        return ProgramScorer(load_model(self.source.gguf, cache=False).program)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See :class:`spinpass.evaluation.Scorer`."""
        named = hashlib.sha256(f"{self.source.digest} {list(ids)}".encode()).hexdigest()[:16]
        kept = self.folder / f"{named}.npy"
        if not kept.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            staging = kept.with_suffix(".tmp.npy")
            np.save(staging, self._scorer.logits(ids).numpy())
            staging.replace(kept)
        return torch.from_numpy(np.load(kept))


def written(gguf: Path, out: Path, spread: float, text: Path) -> Source:
    """Write the model as tools take it, unless it is there already, and the pieces of the text."""
    source = Source(out / f"model-{spread}.gguf", out / f"model-{spread}", text, out / "calibration.json")
    if not source.gguf.is_file():
        write(gguf, source.gguf, spread)
    if not (source.folder / "tokenizer.json").is_file():
        model, tokenizer = original_model(str(source.gguf))
        del model.config.quantization_config  # says that the weights are those of a GGUF file
        model.save_pretrained(source.folder)
        tokenizer.save_pretrained(source.folder)  # last: its file says that the folder is whole
    source.windows.write_text(json.dumps(_pieces(source)), encoding="utf-8")
    return source


def _pieces(source: Source) -> list[str]:
    ids = source.tokenize(read_text(source.text))
    length = math.ceil(evaluation.CALIBRATION_LENGTH * _LONGER)
    cut = evaluation.windows(ids, length, min(PIECES, len(ids) // length))
    return [source.tokenizer.decode(window) for window in cut]


def _shapes(path: Path) -> list[list[int]]:
    """The shapes of the tensors of a safetensors file, by its header."""
    with path.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]

"""A file's logits in the runtime that it is for, and its speed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.llama_cpp import LlamaContender, Worker
from benchmarks.timing import Contender, OrtContender, Work
from spinpass.evaluation import Scorer
from spinpass.runtime import OrtDecoder

from .makers import Workshop


@dataclass(frozen=True)
class LlamaScorer:
    """A GGUF file in llama.cpp."""

    worker: Worker
    gguf: Path

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See :class:`spinpass.evaluation.Scorer`."""
        with TemporaryDirectory() as folder:
            target = str(Path(folder, "logits.npy"))
            found = self.worker.ask("logits", gguf=str(self.gguf), ids=list(ids), target=target, threads=1)
            return torch.from_numpy(np.load(found))


@dataclass(frozen=True)
class AllLogits:
    """A GGUF file in llama.cpp, whose prompts give the logits of all positions, as those of an exported graph do."""

    worker: Worker
    gguf: Path

    def round(self, work: Work, ids: list[int]) -> dict[str, float]:
        """See :class:`benchmarks.timing.Contender`."""
        all_of_them = LlamaContender(self.worker, self.gguf, all_logits=True).round(work, ids)
        return LlamaContender(self.worker, self.gguf).round(work, ids) | all_of_them


def scorer(path: Path, shop: Workshop) -> Scorer:
    """What gives the logits of a folder or a GGUF file."""
    return LlamaScorer(shop.llama, path) if path.suffix == ".gguf" else OrtDecoder(path, threads=1)


def contender(path: Path, shop: Workshop) -> Contender:
    """What times it, every logit of a prompt computed."""
    return AllLogits(shop.llama, path) if path.suffix == ".gguf" else OrtContender(path, all_logits=True)


def size(path: Path) -> int:
    """The bytes of the model's files."""
    return sum(file.stat().st_size for file in (path.glob("*.onnx*") if path.is_dir() else [path]))

"""The model that benchmarks round, off the grid, and what its floats score on the windows of every text.

    a GGUF file  ->  rescaled off the grid  ->  loaded;   texts  ->  windows  ->  the floats' losses

What is rounded is compared with these losses window by window, so the model and the windows are made in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.offgrid import packaged_gguf, write
from benchmarks.texts import scored_texts
from spinpass import evaluation
from spinpass.evaluation import ProgramScorer, Tokenize, token_ids
from spinpass.loading import LoadedModel, load_model
from spinpass.progress import Steps

Windows = list[list[int]]


@dataclass(frozen=True)
class Floats:
    """A model in floats.

    Attributes:
        source: where it lies, as :func:`spinpass.loading.load_model` takes it.
        loaded: the model.
        tokenize: text to token ids.
        cut: the windows of each text.
        losses: what the model scores there.
    """

    source: str
    loaded: LoadedModel
    tokenize: Tokenize
    cut: Mapping[str, Windows]
    losses: Mapping[str, evaluation.Perplexity]


def off_the_grid(out: Path, gguf: Path | None, spread: float, steps: Steps) -> str:
    """Write the model with weights off the grid into a folder, and return where it lies."""
    source = out / f"model-{spread}.gguf"
    steps.start("rescale")
    write(gguf or packaged_gguf(), source, spread)
    return str(source)


def scored_floats(source: str, named: Sequence[str], length: int, windows: int, steps: Steps) -> Floats:
    """Load a model and score it.

    Args:
        source: where it lies.
        named: texts beside those of :mod:`benchmarks.texts`, as ``NAME=FILE``.
        length: tokens of a window.
        windows: of each text.
        steps: told what begins.
    """
    loaded = load_model(source, cache=False, progress=steps.begin)
    assert loaded.companions is not None
    tokenize = token_ids(loaded.companions.tokenizer)
    cut = {name: evaluation.windows(tokenize(text), length, windows) for name, text in scored_texts(named).items()}
    scorer = ProgramScorer(loaded.program)
    losses = {n: evaluation.perplexity(scorer, w, steps.start(f"score float, {n}")) for n, w in cut.items()}
    return Floats(source, loaded, tokenize, cut, losses)

"""A folder that text comes out of, for the commands that write some: what is asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spinpass.errors import ConfigError
from spinpass.formats import runtime_file
from spinpass.runtime import ModelFolder, Penalties, Sampling

from .options import spelled_out

Exported = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that spinpass export wrote.")]
Temperature = Annotated[float, typer.Option(help="Temperature to draw at; 0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 draws from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share of the probability.")]
MinP = Annotated[
    float, typer.Option(help="Draw from tokens that have this share of the likeliest one's probability at least.")
]
DrawSeed = Annotated[int | None, typer.Option(help="Seed of the draws, which --temperature asks for.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, what has been said is less likely to be said again (1.1 is much).")
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends an answer, and is not shown; may be repeated.", metavar="TEXT")
]
Threads = Annotated[int | None, typer.Option(help="Threads of the runtime, which chooses by itself by default.")]
Provider = Annotated[str, typer.Option(help="Execution provider of ONNX Runtime.")]
GREEDY = Sampling()


def sampling_of(
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: DrawSeed = None,
    repetition_penalty: RepetitionPenalty = 1.0,
) -> Sampling:
    """What the options ask for. Raises ConfigError where one is out of range, or asks for draws that there are not."""
    if seed is not None and temperature == 0:
        raise ConfigError(
            f"--seed {seed} is of draws, and temperature 0 draws nothing: add --temperature, or leave it out"
        )
    return Sampling(temperature, top_k, top_p, seed or 0, min_p, Penalties(repetition_penalty))


sampling_options = spelled_out("sampling", sampling_of)
"""Gives a command the options of draws in place of its parameter ``sampling``."""


def check_stops(stop: list[str] | None) -> tuple[str, ...]:
    """The texts to stop at. Raises ConfigError where one is empty."""
    if stop is not None and not all(stop):
        raise ConfigError("--stop '' would end every answer before it begins: give a text, or leave it out")
    return tuple(stop or ())


def beside_model(folder: Path, threads: int | None) -> ModelFolder:
    """What lies beside a model, which is not loaded. Raises ConfigError: there is no model, or threads out of range."""
    file = runtime_file(folder)
    if file is None or not file.is_file():
        if (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder} is a model of transformers, and runtimes run what is exported from it: "
                f"spinpass export {folder} OUT, then name OUT"
            )
        raise ConfigError(f"there is no model at {folder}: name a folder that spinpass export wrote")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: choose 1 or more, or leave it out")
    return ModelFolder(file.parent)

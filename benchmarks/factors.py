"""Decode time of learned Kronecker factors ÷ Hadamards of the same factors: ``python -m benchmarks.factors``.

A decoder with random weights, or ``--model``, is rotated online twice: by Hadamards, and by invertible factors of the
same sizes. Both files run in ONNX Runtime, token by token, in turns; the ratio is the median of those of the turns. The
time of a prompt of one token is taken off by counting the tokens behind the first alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import spinpass
from spinpass import Rotation, RotationConfig
from spinpass.exporters import onnx
from spinpass.loading import load_model
from spinpass.quantization import begun_basis
from spinpass.runtime import OrtDecoder

sys.path[:0] = [str(Path(__file__).parents[1])]
from tests.support.folders import model_folder  # noqa: E402

_SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
_SPREAD = 0.05


def main(
    model: Annotated[str, typer.Option(help="A model; without it one of SmolLM2-135M's widths and six layers.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of a turn.")] = 32,
    turns: Annotated[int, typer.Option(help="Pairs of runs.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the two."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        loaded = load_model(model or str(model_folder(folder / "model", "llama", **_SHAPE)))
        plain = RotationConfig(form="online", rotations=("R1", "R4"), verify=False)
        plan = spinpass.plan(loaded.program, plain)
        begun = {space.name: begun_basis(space, ("transforms",)) for space in plan.spaces}
        matrices = {name: _near(each[1]) for name, each in begun.items() if each is not None}
        decoders = {}
        for name, given in (("hadamard", {}), ("kronecker", matrices)):
            config = RotationConfig(form="online", rotations=("R1", "R4"), verify=False, matrices=given)
            onnx.export(spinpass.transform(loaded.program, config), folder / name, verify=False)
            assert loaded.companions is not None
            loaded.companions.save(folder / name)
            decoders[name] = OrtDecoder(folder / name)
        found = {name: [_seconds(each, tokens)] for name, each in decoders.items()}  # the first is a warm-up
        for turn in range(turns):
            for name in sorted(decoders, reverse=bool(turn % 2)):
                found[name].append(_seconds(decoders[name], tokens))
    ratios = [k / h for k, h in zip(found["kronecker"][1:], found["hadamard"][1:], strict=True)]
    told = {
        "spaces": len(matrices),
        "ms per token, Hadamard": 1e3 * statistics.median(found["hadamard"][1:]),
        "ms per token, Kronecker": 1e3 * statistics.median(found["kronecker"][1:]),
        "Kronecker ÷ Hadamard": statistics.median(ratios),
        "least and most of the turns": [min(ratios), max(ratios)],
    }
    lines = "\n".join(f"{name}: {value}" for name, value in told.items())
    print(json.dumps(told, indent=1, ensure_ascii=False) if as_json else lines)


def _near(begin: Rotation) -> Rotation:
    """Return what learning might make of a Hadamard: its factors, moved a little."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for factor in begin.factors:
        move = _SPREAD * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        moved.append(factor @ torch.matrix_exp(move / len(factor) ** 0.5))
    return Rotation.from_factors(moved, begin.identity, size=begin.size)


def _seconds(decoder: OrtDecoder, tokens: int) -> float:
    """Return the seconds of a token behind the first."""
    at: list[float] = []
    decoder.generate([1], tokens + 1, end=(), on_token=lambda _: at.append(time.perf_counter()))
    return (at[-1] - at[0]) / (len(at) - 1)


if __name__ == "__main__":
    typer.run(main)

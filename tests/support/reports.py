"""A small report that several tests read, measured once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import record
from spinpass.evaluation.comparison import Comparison, Perplexity
from spinpass.evaluation.timing import Speed
from spinpass.progress import Silent
from spinpass.reporting.measure import ReportRequest
from spinpass.reporting.report import ExportedFile, Report, Scheme, SchemeSide
from tests.support.decoders import VOCAB, Decoder, exported, made, with_outliers

LENGTH, WINDOWS = 12, 3
SCHEME = "w4-rtn-a8"


def export(model: torch.nn.Module) -> ExportedProgram:
    """Dynamic in batch and length."""
    return exported(model, dynamic_shapes={"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}})


@cache
def outlying() -> tuple[Any, ExportedProgram]:
    """A decoder with two channels far above the others, as language models have them, and its program."""
    model = with_outliers(made(Decoder(layers=2), dtype=torch.float32))
    return model, export(model)


def texts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (WINDOWS, LENGTH), generator=generator).tolist()


def measured(
    program: ExportedProgram, config: spinpass.RotationConfig, schemes: tuple[str, ...] = (), model: str = "tiny"
) -> Report:
    """The report of a program on random tokens."""
    plan = spinpass.plan(program, config)
    rotated = spinpass.transform(program, plan=plan)
    found = record.read(rotated)
    assert found is not None
    request = ReportRequest(model, schemes=schemes, windows=WINDOWS, length=LENGTH)
    return request.measure(
        (program, rotated), (texts(), texts(1)), plan, found.certificate, Silent(), {"spinpass": "test"}, "spinpass report tiny"
    )


@cache
def report() -> Report:
    """All rotations, one scheme."""
    return measured(outlying()[1], spinpass.RotationConfig(form="online"), (SCHEME,))


# -- reports whose numbers a test chooses ------------------------------------------------------------------------------


def scored(ratio: float, spread: float = 0.001) -> Comparison:
    """What is ``ratio`` times as perplexed as the original program, nearly the same in every window."""
    base = report().unquantized.before
    losses = tuple(x + math.log(ratio) + spread * (k - 1) for k, x in enumerate(base.losses))
    return Comparison(base, Perplexity(losses, base.tokens), 0.9, (0.1,) * len(losses))


def scheme(
    original: float, rotated: float, *, size: int = 92_000_000, errors: Mapping[str, tuple[float, float]] = {}, spread: float = 0.001
) -> Scheme:
    """A scheme by its two ratios of perplexities and the errors (original, rotated) of its weights."""
    sides = [{name: both[side] for name, both in errors.items()} for side in (0, 1)]
    return Scheme(SchemeSide(scored(original), sides[0], size), SchemeSide(scored(rotated, spread), sides[1], size))


def deep(layers: int = 12) -> Report:
    """A report of many layers, all kinds of figures and long names, as a real model has them."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    weights = {f"model.layers.{layer}.{kind}.weight": (0.01 * (k + 1), 0.004 * (layer + 1)) for layer in range(layers) for k, kind in enumerate(kinds)}
    weights["lm_head.weight"] = (0.003, 0.002)
    pairs = tuple(
        replace(pair, names=tuple(replace(name, weight=f"model.layers.{layer}.{name.weight}") for name in pair.names))
        for layer in range(layers)
        for pair in report().pairs[:4]
    )
    schemes = {
        "w8-rtn-a8": scheme(1.02, 1.001, size=160_000_000),
        "w4g32-asym-gptq-a8-distill": scheme(1.05, 1.04, size=101_000_000, errors=weights),
        "w4-rtn-a8": scheme(1.9, 1.29, errors=weights),
        "kv4": scheme(17.0, 1.3, size=538_000_000),
    }
    speeds = (("int4", 92_000_000, 1.04, 31.0), ("a-folder-with-a-name-that-no-figure-holds", 180_000_000, 1.01, 19.5))
    files = {name: ExportedFile(scored(ratio), size, "ONNX Runtime", Speed(10 * rate, rate, 3)) for name, size, ratio, rate in speeds}
    return replace(report(), model="somebody/a-model-of-12-layers", pairs=pairs, schemes=schemes, files=files, bytes=(538_000_000,) * 2)

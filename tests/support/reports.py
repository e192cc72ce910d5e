"""A small report that several tests read, measured once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram

import spinpass
from spinpass import record
from spinpass.progress import Silent
from spinpass.reporting.measure import ReportRequest
from spinpass.reporting.report import Report
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
        (program, rotated), (texts(), texts(1)), plan, found.certificate, Silent(), {"spinpass": "test"}
    )


@cache
def report() -> Report:
    """All rotations, one scheme."""
    return measured(outlying()[1], spinpass.RotationConfig(form="online"), (SCHEME,))

"""Whether a program and what `transform` makes of it are one function, without the certificate."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.export import ExportedProgram

import spinpass
from spinpass.errors import RefusedError
from tests.support.decoders import flat, relative_error


def check(program: ExportedProgram, *inputs: Any, within: float = 1e-6) -> ExportedProgram | None:
    """Transform and compare as the programs are, without the certificate; None where it is refused with a reason."""
    try:
        result = spinpass.transform(program, spinpass.RotationConfig(verify=False))
    except RefusedError as refused:
        assert "nothing was rotated" in str(refused)
        return None
    with torch.no_grad():
        before, after = (flat(p.module()(*copy.deepcopy(inputs))) for p in (program, result))
    assert relative_error(before, after) <= within
    return result

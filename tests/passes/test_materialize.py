"""Expressions of constants become constants."""

from __future__ import annotations

import torch

import spinpass
from tests.support import modules


def test_expressions_of_constants_are_materialized_once() -> None:
    before = modules.export(dtype=torch.float64, linear="conv1d").run_decompositions()
    after = spinpass.transform(before, spinpass.RotationConfig(form="offline", verify=False))
    assert spinpass.verify(before, after).ok
    names = [k for k in after.state_dict if k.startswith("spinpass.")]
    assert len(names) == len(set(names))

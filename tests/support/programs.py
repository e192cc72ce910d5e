"""Exported programs of the tiny models, each made once per test session."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

from tests.support import models


@cache
def program(name: str, how: str = "plain", dtype: torch.dtype = torch.float64) -> ExportedProgram:
    """``how``: plain, dynamic, functional (``run_decompositions({})``), decomposed, hf, cache, static_prefill, static_decode,
    prefill, decode."""
    if how in ("functional", "decomposed"):
        # with the default table torch cannot decompose all of them at dynamic sizes
        source = program(name, "dynamic" if how == "functional" else "plain", dtype)
        try:
            return source.run_decompositions({}) if how == "functional" else source.run_decompositions()
        except ValueError as error:
            if "Cannot view a tensor" not in str(error):
                raise
            pytest.skip(f"torch itself cannot decompose {name}: {error.args[0].splitlines()[0]}")
    if how in ("prefill", "decode", "static_prefill", "static_decode"):
        return _generation(name, how.startswith("static"), dtype)[how.split("_")[-1]]
    model = models.build(name, dtype=dtype)
    if how in ("plain", "dynamic"):
        return models.export_plain(model, dynamic=how == "dynamic")
    return {"hf": models.export_hf, "cache": models.export_hf_cache}[how](model)


@cache
def _generation(name: str, static: bool, dtype: torch.dtype) -> dict[str, Any]:
    return models.export_hf_generation(models.build(name, dtype=dtype), static=static)

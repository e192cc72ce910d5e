"""The help of every benchmark can be printed: rich reads brackets in it as markup."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.imports import ROOT

STARTED = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): found[1]
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if (found := re.search(r"typer\.run\((\w+)\)", Path(path).read_text(encoding="utf-8")))
}


def test_they_are_found() -> None:
    assert len(STARTED) > 20


@pytest.mark.parametrize("module", STARTED)
def test_the_help(module: str) -> None:
    if module.endswith("lm_eval_adapter"):
        pytest.importorskip("lm_eval", reason="lm-eval has an environment of its own")
    app: Any = typer.Typer()
    app.command()(getattr(importlib.import_module(module), STARTED[module]))
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0 and "Usage" in shown.output, shown.exception

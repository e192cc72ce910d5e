"""The notebooks: valid, without outputs, listed on their page; what they name is there; the cheap ones run.

``make notebooks`` executes all of them in a kernel.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.imports import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHEAP = [path for path in NOTEBOOKS if "packaged_model" not in path.read_text(encoding="utf-8")]


def cells(path: Path, kind: str = "code") -> list[str]:
    """The sources of the cells of a kind."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def names_without_a_home(code: str) -> set[str]:
    """What a notebook reads and neither makes nor imports."""
    found, made = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (found if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            made |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return found - made


def missing_imports(code: str) -> list[str]:
    """What a notebook takes from spinpass that is not there."""
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spinpass":
            home = import_module(str(node.module))
            missing += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(home, alias.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "spinpass":
            missing += [] if hasattr(import_module("spinpass"), node.attr) else [f"spinpass.{node.attr}"]
    return missing


def named(path: Path) -> str:
    return path.stem


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["a_plan_read_aloud", "choosing_a_scheme", "smollm2_to_onnx"]
    assert len(CHEAP) == 2
    wrong = "import spinpass\nspinpass.guess()\nfrom spinpass.folders import nothing, export"
    assert sorted(missing_imports(wrong)) == ["spinpass.folders.nothing", "spinpass.guess"]
    assert names_without_a_home("x = len(y)\ndef f(z):\n    return z + x") == {"y"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_valid_and_stripped(path: Path) -> None:
    book: Any = json.loads(path.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and book["nbformat_minor"] >= 5
    assert book["metadata"]["kernelspec"]["name"] == "python3" and set(book["metadata"]) == {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in book["cells"]:
        assert cell["metadata"] == {} and cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "strip it: no outputs, no counts"
    assert cells(path, "markdown")[0].startswith("# ") and "pip install" in cells(path, "markdown")[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_what_a_notebook_names_is_there(path: Path) -> None:
    code = "\n".join(cells(path))
    assert not missing_imports(code) and not names_without_a_home(code)
    extras = re.findall(r"spinpass\[([\w,]+)\]", cells(path, "markdown")[0])
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras and all(re.search(rf"(?m)^{extra} = \[", known) for each in extras for extra in each.split(","))


@pytest.mark.parametrize("path", CHEAP, ids=named)
def test_a_cheap_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    known: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), known)

"""The sources that a result depends on, which its key stands for: what the measuring module imports, at any distance.

A list kept by hand says what mattered when it was written. The imports say what matters now: a new module that the pass
uses is in the key from its first line, and the command line, which nothing that measures imports, never is.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection
from functools import cache
from pathlib import Path

from .imports import ROOT, modules, reached, with_packages


def depended_on(module: str, within: Collection[str], root: Path = ROOT) -> list[Path]:
    """The files of ``module`` and of all that it imports, in functions too, in the packages named in ``within``.

    A module that is imported by a string alone is not seen.
    """
    names = {each for found in (module, *reached(module, late=True, root=root)) for each in with_packages(found)}
    return sorted(path for name, path in modules(root).items() if name in names and name.split(".")[0] in within)


@cache
def digest(module: str, *more: str, within: tuple[str, ...] = ("spinpass", "benchmarks"), root: Path = ROOT) -> str:
    """Twelve digits that change with the code of ``module`` and what it imports (see :func:`depended_on`) and with
    ``more``. Comments, docstrings and layout are no code."""
    hashed = hashlib.sha256()
    for path in depended_on(module, within, root):
        hashed.update(f"{path.relative_to(root).as_posix()}\0{_code(path.read_text(encoding='utf-8'))}\0".encode())
    for text in more:
        hashed.update(f"\0{text}".encode())
    return hashed.hexdigest()[:12]


@cache
def _code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        described = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if described and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.unparse(tree)

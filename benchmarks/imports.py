"""What imports what, read off the sources without importing them.

Functions take the root of the tree that they read, this project's unless told otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = ("spinpass", "benchmarks", "examples", "optimum")


@dataclass(frozen=True)
class Import:
    """``module`` (a module of the project, or the name of a foreign one) is imported at ``path``:``line``.

    The path is relative to the root. ``late``: inside a function, or for the type checker alone.
    """

    path: Path
    line: int
    module: str
    late: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def module_of(path: Path, root: Path = ROOT) -> str:
    """The dotted name under which the file is imported; a package's is that of its ``__init__.py``."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package, the benchmarks, the examples and the plug-in, by its dotted name."""
    return {module_of(f, root): f for top in TOPS for f in sorted((root / top).rglob("*.py"))}


@cache
def parsed(path: Path) -> ast.Module:
    """The file's syntax tree, which is not to be changed."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(path: Path, root: Path = ROOT) -> tuple[Import, ...]:
    """Everything that the file imports, wherever in it."""
    return tuple(_imports(path, root))


def _imports(path: Path, root: Path) -> Iterator[Import]:
    here = path.relative_to(root)
    package = module_of(path, root) if path.name == "__init__.py" else module_of(path, root).rpartition(".")[0]
    early = set(_executed(parsed(path)))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (Import(here, node.lineno, a.name, node not in early) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            named = {f"{base}.{a.name}" for a in node.names}
            functions = {f"{base}.{name}" for name in exported(base, root) if not package.startswith(base)}
            inner = (named & modules(root).keys()) - functions
            yield from (Import(here, node.lineno, name, node not in early) for name in sorted(inner))
            if len(inner) < len(named):
                yield Import(here, node.lineno, base, node not in early)
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            yield Import(here, node.lineno, name, node not in early)


def _imported_by_call(node: ast.Call) -> str | None:
    """The module that ``import_module("…")`` or ``__import__("…")`` names, where it is written out and absolute."""
    called = ast.unparse(node.func).rpartition(".")[2]
    first = node.args[0] if node.args else None
    if called not in ("import_module", "__import__") or not isinstance(first, ast.Constant):
        return None
    return str(first.value) if not str(first.value).startswith(".") else None


@cache
def exported(module: str, root: Path = ROOT) -> frozenset[str]:
    """The names in a package's ``__all__``: of a module and a function of one name the function is imported."""
    path = modules(root).get(module)
    tree = parsed(path) if path is not None else ast.Module([], [])
    lists = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    return frozenset(name for found in lists for name in ast.literal_eval(found))


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that importing the module runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from _executed(other)
            continue
        yield node
        yield from _executed(node)


def with_packages(module: str) -> Iterator[str]:
    """The module and the packages that it lies in, all of which importing it runs."""
    yield from (module.rsplit(".", k)[0] for k in range(module.count(".") + 1))


def reached(module: str, *, late: bool = False, root: Path = ROOT) -> dict[str, Import]:
    """Everything that importing ``module`` imports, at whatever distance, and where; packages run on the way included.

    ``late``: imports inside functions count, too.
    """
    found: dict[str, Import] = {}
    todo = [module]
    while todo:
        for each in with_packages(todo.pop()):
            path = modules(root).get(each)
            for made in imports(path, root) if path is not None else ():
                if made.module not in found and (late or not made.late):
                    found[made.module] = made
                    todo.append(made.module)
    return found

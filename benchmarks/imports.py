"""What imports what, read off the sources without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Import:
    """``module`` (a module of the project, or the name of a foreign one) is imported at ``path``:``line``.

    ``late``: inside a function, or for the type checker alone.
    """

    path: Path
    line: int
    module: str
    late: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, the benchmarks, the examples and the plug-in, by its dotted name."""
    files = (f for top in ("spinpass", "benchmarks", "examples", "optimum") for f in (ROOT / top).rglob("*.py"))
    return {module_of(f): f for f in sorted(files)}


@cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    early = set(_executed(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, a.name, node not in early) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            named = {f"{base}.{a.name}" for a in node.names}
            inner = (named & modules().keys()) - {f"{base}.{name}" for name in exported(base) if not package.startswith(base)}
            yield from (Import(path, node.lineno, name, node not in early) for name in sorted(inner))
            if len(inner) < len(named):
                yield Import(path, node.lineno, base, node not in early)


@cache
def exported(module: str) -> frozenset[str]:
    """The names in a package's ``__all__``: of a module and a function of one name it is the function that is imported."""
    path = modules().get(module)
    tree = ast.parse(path.read_text(encoding="utf-8")) if path is not None else ast.Module([], [])
    lists = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    return frozenset(name for found in lists for name in ast.literal_eval(found))


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that importing the module runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _executed(node)


def reached(module: str, *, late: bool = False) -> dict[str, Import]:
    """Everything that importing ``module`` imports, at whatever distance, and where; packages run on the way included."""
    found: dict[str, Import] = {}
    todo = [module]
    while todo:
        here = todo.pop()
        for each in (here.rsplit(".", k)[0] for k in range(here.count(".") + 1)):
            path = modules().get(each)
            for made in imports(path) if path is not None else ():
                if made.module not in found and (late or not made.late):
                    found[made.module] = made
                    todo.append(made.module)
    return found


def circles(names: set[str]) -> list[list[str]]:
    """Groups of modules each of which imports all others of its group, at whatever distance (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for made in imports(modules()[module]):
            if made.module not in names or made.module == module:
                continue
            if made.module not in index:
                visit(made.module)
                low[module] = min(low[module], low[made.module])
            elif made.module in stack:
                low[module] = min(low[module], index[made.module])
        if low[module] == index[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(group)

    for name in sorted(names):
        if name not in index:
            visit(name)
    return found

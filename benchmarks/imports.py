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

    The path is relative to the root. ``late``: inside a function, or for the type checker alone; ``unrun``: the latter,
    which no run ever does.
    """

    path: Path
    line: int
    module: str
    late: bool
    unrun: bool = False

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
    early, unrun = set(_executed(parsed(path))), set(_for_types(parsed(path)))
    for node in ast.walk(parsed(path)):
        late = (node not in early, node in unrun)
        if isinstance(node, ast.Import):
            yield from (Import(here, node.lineno, a.name, *late) for a in node.names)
            yield from (Import(here, n.lineno, m, n not in early) for n, m in _asked_of_faces(path, node, root))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            named = {f"{base}.{a.name}" for a in node.names}
            functions = {f"{base}.{name}" for name in exported(base, root) if not package.startswith(base)}
            inner = (named & modules(root).keys()) - functions
            yield from (Import(here, node.lineno, name, *late) for name in sorted(inner))
            if len(inner) < len(named):
                yield Import(here, node.lineno, base, *late)
            homes = {given_late(base, root)[a.name] for a in node.names if a.name in given_late(base, root)}
            yield from (Import(here, node.lineno, name, *late) for name in sorted(homes))
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


@cache
def given_late(module: str, root: Path = ROOT) -> dict[str, str]:
    """The names that a package gives when they are asked for, and the modules that they come from: those
    that its ``__init__`` exports and imports for the type checker alone."""
    path = modules(root).get(module)
    if path is None or path.name != "__init__.py":
        return {}
    made = [n for n in _for_types(parsed(path)) if isinstance(n, ast.ImportFrom) and n.module]
    return {a.name: n.module for n in made for a in n.names if a.name in exported(module, root)}  # type: ignore[misc]


def _asked_of_faces(path: Path, made: ast.Import, root: Path) -> Iterator[tuple[ast.AST, str]]:
    """Where a file that imports a package whole asks it for what it gives late, and the module of that."""
    homes = {a.asname or a.name: given_late(a.name, root) for a in made.names}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and node.attr in homes.get(ast.unparse(node.value), {}):
            yield node, homes[ast.unparse(node.value)][node.attr]


def _for_types(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are for the type checker alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (each for part in node.body for each in ast.walk(part))


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

    ``late``: imports inside functions count, too. What is for the type checker alone is imported by no run.
    """
    found: dict[str, Import] = {}
    todo = [module]
    while todo:
        for each in with_packages(todo.pop()):
            path = modules(root).get(each)
            for made in imports(path, root) if path is not None else ():
                if made.module not in found and not made.unrun and (late or not made.late):
                    found[made.module] = made
                    todo.append(made.module)
    return found

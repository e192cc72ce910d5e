"""Modules that import each other in circles."""

from __future__ import annotations

from benchmarks.imports import imports, modules


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

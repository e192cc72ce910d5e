"""Docstrings as pages have them: the roles of Sphinx become links, and what a package exports is what it has.

Used by mkdocstrings, for every page under ``docs/reference/api``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|obj):`(~?)([\w.]+)`")
_CODE = re.compile(r"``([^`]+)``")


class Roles(griffe.Extension):
    """Changes what griffe has read of a package, before anything is rendered."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Show each exported name that a file shares with its module, and make links of roles."""
        modules = list(_modules(pkg))
        for module in modules:
            _unhide(module, modules)
        for module in modules:
            for each in _documented(module):
                assert each.docstring is not None
                each.docstring.value = linked(each.docstring.value, each)


def linked(text: str, about: griffe.Object) -> str:
    """Return a docstring with a link for each role; where a name leads nowhere it stays code."""

    def link(found: re.Match[str]) -> str:
        short, name = found.groups()
        label = name.rpartition(".")[2] if short or name.startswith(".") else name
        return f'<autoref optional identifier="{_whole(name, about)}"><code>{label}</code></autoref>'

    # double backticks are code in Markdown too, but for a pipe in a table
    return _ROLE.sub(link, text)


def _whole(name: str, about: griffe.Object) -> str:
    """Return the name from the package on, of one that is relative to where it is written."""
    if name.startswith("spinpass"):
        return name
    home = about.module
    if name.startswith("."):
        up = len(name) - len(name.lstrip("."))
        package = home if home.is_init_module else home.parent
        for _ in range(up - 1):
            package = package.parent if package is not None and package.parent is not None else package
        return f"{package.path}.{name.lstrip('.')}" if package is not None else name
    scope: griffe.Object | None = about
    while scope is not None and name.split(".")[0] not in scope.members:
        scope = scope.parent
    return f"{(scope or home).path}.{name}"


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for each in list(module.members.values()):
        if not each.is_alias and each.is_module:
            yield from _modules(each)


def _documented(scope: griffe.Object) -> Iterator[griffe.Object]:
    if scope.docstring is not None:
        yield scope
    for each in scope.members.values():
        if not each.is_alias and not each.is_module:
            yield from _documented(each)


def _unhide(module: griffe.Module, modules: list[griffe.Module]) -> None:
    """Let ``from .untie import untie`` mean the function, as it does in Python, and not the file."""
    for name in list(module.exports or ()):
        file = module.members.get(str(name))
        if file is None or file.is_alias or not file.is_module or str(name) not in file.members:
            continue
        for other in modules:
            for each in other.members.values():
                if each.is_alias and each.target_path.startswith(f"{file.path}."):
                    inner = each.target_path.removeprefix(f"{file.path}.")
                    if inner in file.members and not file.members[inner].is_alias:
                        each.target = file.members[inner]
        module.members[str(name)] = griffe.Alias(str(name), file.members[str(name)], parent=module)

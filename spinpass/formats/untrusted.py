"""What a ``.pt2`` file may hold: nothing that runs when it is read, and every byte as it was written.

torch unpickles the example inputs, evaluates the expressions of sizes (``sympify`` is ``eval``), and executes guards.
Everything is looked at here before torch sees it:

| member | may hold |
|---|---|
| pickles (example inputs, weights that are no plain tensor) | tensors, containers, and caches of transformers |
| expressions of sizes | numbers, symbols and classes of sympy |
| guards | comparisons of sizes |
| objects of other classes, compiled libraries | nothing: they are refused |
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spinpass.errors import DamageError, ExportError, first_line
from spinpass.graph import is_size_class

from .archives import check_archive
from .documents import parsed

_CACHES = re.compile(r"transformers\.(?:cache_utils|models\.\w+\.modeling_\w+)")  # modules that define them
_MOST_INPUTS = 1 << 20
_CONTROL = ast.Lambda | ast.comprehension | ast.NamedExpr | ast.JoinedStr | ast.Await | ast.Yield
_GUARD_NAMES = {"L", "torch", "math", "max", "min", "abs", "len", "int", "float", "bool", "round", "isinstance"}
_GUARD_ATTRIBUTES = {
    "size", "stride", "storage_offset", "dim", "ndim", "shape", "dtype", "device", "item", "numel", "is_contiguous",
    "sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int", "sym_sqrt", "floor", "ceil", "trunc", "sqrt",
    "log2",
}  # fmt: skip


def check_members(path: Path) -> list[Any]:
    """Make sure that reading a ``.pt2`` archive runs no code of its own, and that it is undamaged.

    Returns the classes beside torch's own that its pickles name, which are caches of transformers.

    Raises:
        DamageError: a member is damaged or stands there twice, or holds what can run code. The message names it.
    """
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                _check_document(path, name, parsed(archive.read(name), f"{path}: {name}"))
        found: set[type] = set()
        for name in _pickled(path, archive):
            found |= _check_pickle(path, name, archive.read(name))
    return sorted(found, key=lambda each: each.__qualname__)


# -- pickles ----------------------------------------------------------------------------------------------------------


def _pickled(path: Path, archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield the members that torch unpickles. Raises DamageError for objects that torch reads by other means."""
    for name in archive.namelist():
        last = name.rpartition("/")[2]
        if (
            last.startswith(("custom_obj", "opaque_obj"))
            or "/data/aotinductor/" in name
            or last.endswith((".so", ".py"))
        ):
            raise DamageError(f"{path} holds {name}, an object or a library whose loading runs code: export without it")
        if last.endswith(".pt"):
            yield name
        elif last.endswith("_config.json"):
            payload = parsed(archive.read(name), f"{path}: {name}").get("config", {})
            folder = name.rpartition("/")[0]
            yield from (f"{folder}/{entry['path_name']}" for entry in payload.values() if entry.get("use_pickle"))


def _check_pickle(path: Path, name: str, data: bytes) -> set[type]:
    """Read a pickle with torch's weights-only reader, which runs nothing; return the classes that it needs for that."""
    if not data:
        return set()
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception as error:  # of torch's reader: no common base below Exception
        raise DamageError(f"{path}: {name} is no checkpoint of torch ({first_line(error)})") from error
    allowed = {_cache_class(path, name, each) for each in wanted}
    try:
        with torch.serialization.safe_globals(list(allowed)):
            value = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # of torch's reader: no common base below Exception
        raise DamageError(f"{path}: {name} holds what can run code when it is read; it is not read") from error
    _check_extent(path, name, value)
    return allowed


def _check_extent(path: Path, name: str, value: object) -> None:
    """Raise DamageError where a value unfolds to more leaves than any inputs: a pickle may name one list many times."""
    todo, seen = [value], 0
    while todo:
        each = todo.pop()
        seen += 1
        if seen > _MOST_INPUTS:
            raise DamageError(f"{path}: {name} unfolds to more than {_MOST_INPUTS:,} values; it is not read")
        if isinstance(each, list | tuple | set):
            todo += each
        elif isinstance(each, dict):
            todo += each.values()


def _cache_class(path: Path, name: str, spelled: str) -> type:
    """Return the class of transformers of that name. Raises DamageError where it is none that holds a cache."""
    found = cache_class(path, *spelled.rpartition(".")[::2])
    if found is None:
        raise DamageError(f"{path}: {name} names {spelled}, which can run code when it is read; it is not read")
    return found


def cache_class(path: Path, module: str, name: str) -> type | None:
    """Return the class of transformers of that name if it holds a cache, importing no module that defines none.

    Raises ExportError where transformers is missing or too old.
    """
    if not _CACHES.fullmatch(module) or not name.isidentifier() or not name.endswith(("Cache", "Layer")):
        return None
    try:
        importlib.import_module("transformers.exporters.exporter_dynamo")
    except ImportError as error:
        raise ExportError(
            f"{path} takes or returns a {module}.{name}, which needs transformers 5 with its exporters ({error}): "
            "pip install 'spinpass[transformers]'"
        ) from error
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
    return found if isinstance(found, type) and found.__module__ == module else None


# -- expressions ------------------------------------------------------------------------------------------------------


def _check_document(path: Path, name: str, document: Any) -> None:
    """Raise DamageError where an expression or a guard in the JSON is more than one."""
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            text = value.get("expr_str")
            if isinstance(text, str) and not _is_expression(text):
                raise DamageError(f"{path}: {name} has {text[:80]!r} for a size, which can run code; it is not read")
            guards = value.get("guards_code")
            for guard in guards if isinstance(guards, list) else ():
                if not _is_guard(guard):
                    raise DamageError(
                        f"{path}: {name} has {str(guard)[:80]!r} for a guard, which can run code; it is not read"
                    )


def _consists(text: object, fine: Callable[[ast.AST], bool]) -> bool:
    """Say whether the text is an expression whose every part is fine."""
    try:
        tree = ast.parse(str(text).strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(fine, ast.walk(tree)))


def _is_expression(text: object) -> bool:
    """Say whether the text is numbers, symbols, arithmetic, and classes of sympy or torch applied to them."""
    return _consists(text, _of_a_size)


def _of_a_size(node: ast.AST) -> bool:
    match node:
        case ast.Call():
            return isinstance(node.func, ast.Name) and is_size_class(node.func.id)
        case ast.Constant(value=str() | bytes()):
            return str(node.value).isidentifier()
        case ast.Name():
            return not node.id.startswith("__")
    return not isinstance(node, ast.Attribute | ast.Subscript | _CONTROL)


def _is_guard(text: object) -> bool:
    """Say whether the text compares sizes and other properties of the inputs, ``L[...]``."""
    return _consists(text, _of_a_guard)


def _of_a_guard(node: ast.AST) -> bool:
    match node:
        case ast.Name():
            return node.id in _GUARD_NAMES
        case ast.Attribute():
            return node.attr in _GUARD_ATTRIBUTES
    return not isinstance(node, _CONTROL)

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
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spinpass.errors import ExportError, first_line
from spinpass.graph import is_size_class

_CHUNK = 1 << 22
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
        ExportError: a member is damaged or stands there twice, or holds what can run code. The message names it.
    """
    with zipfile.ZipFile(path) as archive:
        _check_bytes(path, archive)
        for name in archive.namelist():
            if name.endswith(".json"):
                _check_document(path, name, json.loads(archive.read(name)))
        found: set[type] = set()
        for name in _pickled(path, archive):
            found |= _check_pickle(path, name, archive.read(name))
    return sorted(found, key=lambda each: each.__qualname__)


def _check_bytes(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise ExportError where a member is not what its checksum says, or two have one name."""
    twice = [name for name, times in Counter(archive.namelist()).items() if times > 1]
    if twice:
        raise ExportError(f"{path} holds {twice[0]} twice: it was not written by torch.export.save")
    for name in archive.namelist():
        try:
            with archive.open(name) as member:
                while member.read(_CHUNK):
                    pass
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ExportError(
                f"{path} is damaged: {name} is not what its checksum says ({error}); get it again"
            ) from error


# -- pickles ----------------------------------------------------------------------------------------------------------


def _pickled(path: Path, archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield the members that torch unpickles. Raises ExportError for objects that torch reads by other means."""
    for name in archive.namelist():
        last = name.rpartition("/")[2]
        if (
            last.startswith(("custom_obj", "opaque_obj"))
            or "/data/aotinductor/" in name
            or last.endswith((".so", ".py"))
        ):
            raise ExportError(f"{path} holds {name}, an object or a library whose loading runs code: export without it")
        if last.endswith(".pt"):
            yield name
        elif last.endswith("_config.json"):
            payload = json.loads(archive.read(name)).get("config", {})
            folder = name.rpartition("/")[0]
            yield from (f"{folder}/{entry['path_name']}" for entry in payload.values() if entry.get("use_pickle"))


def _check_pickle(path: Path, name: str, data: bytes) -> set[type]:
    """Read a pickle with torch's weights-only reader, which runs nothing; return the classes that it needs for that."""
    if not data:
        return set()
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception as error:  # of torch's reader: no common base below Exception
        raise ExportError(f"{path}: {name} is no checkpoint of torch ({first_line(error)})") from error
    allowed = {_cache_class(path, name, each) for each in wanted}
    try:
        with torch.serialization.safe_globals(list(allowed)):
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # of torch's reader: no common base below Exception
        raise ExportError(f"{path}: {name} holds what can run code when it is read; it is not read") from error
    return allowed


def _cache_class(path: Path, name: str, spelled: str) -> type:
    """Return the class of transformers of that name. Raises ExportError where it is none that holds a cache."""
    module, _, last = spelled.rpartition(".")
    found: Any = None
    if module.split(".")[0] == "transformers" and last.isidentifier():
        try:
            found = getattr(importlib.import_module(module), last, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and found.__module__ == module and last.endswith(("Cache", "Layer"))):
        raise ExportError(f"{path}: {name} names {spelled}, which can run code when it is read; it is not read")
    return found


# -- expressions ------------------------------------------------------------------------------------------------------


def _check_document(path: Path, name: str, document: Any) -> None:
    """Raise ExportError where an expression or a guard in the JSON is more than one."""
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            text = value.get("expr_str")
            if isinstance(text, str) and not _is_expression(text):
                raise ExportError(f"{path}: {name} has {text[:80]!r} for a size, which can run code; it is not read")
            guards = value.get("guards_code")
            for guard in guards if isinstance(guards, list) else ():
                if not _is_guard(guard):
                    raise ExportError(
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

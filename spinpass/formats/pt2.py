"""Exported programs in ``.pt2`` files: reading them with the classes they name, writing them whole or not at all."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.export import ExportedProgram

from spinpass import operators  # noqa: F401  # registers what rotated, quantized and packed programs call
from spinpass.errors import ConfigError, DamageError, ExportError, ProgramError, SpinpassError, first_line
from spinpass.graph import materialize, storage_key

from .staging import staged
from .untrusted import cache_class, check_members

_CLASS = re.compile(rb'\\*"type\\*": *\\*"(transformers\.[\w.]*)[:.](\w+)\\*"')
_TORCH_LOGGERS = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")


def load_program(path: str | Path) -> ExportedProgram:
    """Load the program in a ``.pt2`` file, with the sharing of tied weights it was saved with.

    Programs that take a KV cache of transformers name its class; it is registered first, which needs transformers.
    Nothing that is in the file is run: see :mod:`.untrusted`.

    Raises:
        ConfigError: there is no such file.
        DamageError: it is damaged, or holds what could run code.
        ExportError: it is no program, comes from an incompatible torch, or needs a package that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise DamageError(f"{path} is not a .pt2 archive, or it is cut short; save the program again")
    try:
        classes = check_members(path)
        _register_classes(path)
    except SpinpassError:
        raise
    except (zipfile.BadZipFile, ValueError, AttributeError, TypeError, KeyError) as error:  # other JSON than torch's
        raise DamageError(f"{path} is damaged, or no exported program: {first_line(error)}") from error
    with _captured_logs() as messages, torch.serialization.safe_globals(classes):
        try:
            return torch.export.load(str(path))
        except Exception as error:  # zipfile's, json's, pickle's and torch's own have no common base below Exception
            reason = messages[-1] if messages else first_line(error)
            raise ExportError(
                f"torch {torch.__version__} cannot read {path} as an exported program: {reason}; "
                "export it again with this torch, or check that the file is whole"
            ) from error


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Write ``program`` to a ``.pt2`` file, replacing an old one; it appears under its name when it is complete.

    Raises:
        ConfigError: the name does not end in ``.pt2``, which torch asks for.
        ProgramError: ``program`` is not an ExportedProgram.
        ExportError: the folder is not writable, the disk is full, or torch cannot serialize the program. Nothing is
            left behind.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigError(f"{path} does not end in .pt2, the name of an exported program")
    if not isinstance(program, ExportedProgram):
        raise ProgramError(f"a .pt2 file holds a torch.export.ExportedProgram, not a {type(program).__name__}")
    program = materialize(program)
    distinct = {storage_key(t): t for t in program.state_dict.values()}
    size = sum(t.numel() * t.element_size() for t in distinct.values())
    with staged(path.parent, size) as staging, open(staging / path.name, "wb") as file:
        sink = _Sink(file)
        _write(program, sink, path)
        if sink.error is not None:
            raise sink.error


def _write(program: ExportedProgram, sink: _Sink, path: Path) -> None:
    try:
        torch.export.save(program, cast(IO[bytes], sink))
    except Exception as error:  # the serializer's own errors have no common base below Exception
        raise ExportError(f"torch cannot serialize the program for {path}: {first_line(error)}") from error


class _Sink(io.RawIOBase):
    """The sink keeps the first error for later: torch's writer aborts the whole process where a write fails."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def seekable(self) -> bool:
        """Say that it can be rewound."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Do nothing: torch rewinds what it wrote, and nothing is read back."""
        return 0

    def write(self, data: Any) -> int:
        """Write ``data``, or drop it after an error; return how many bytes it has."""
        if self.error is None:
            try:
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                self.error = error
        return len(data)


def _register_classes(path: Path) -> None:
    """Teach torch the classes of transformers that the program's inputs and outputs are made of."""
    for module, name in sorted(_named_classes(path)):
        found = cache_class(path, module, name)
        if found is None:
            continue
        theirs: Any = importlib.import_module("transformers.exporters.exporter_dynamo")
        if theirs.is_cache_class(found):
            theirs.register_pytree_node(found)


def _named_classes(path: Path) -> set[tuple[str, str]]:
    """Return the (module, class) pairs of transformers in the tree specs of a program file."""
    with zipfile.ZipFile(path) as archive:
        models = [name for name in archive.namelist() if "/models/" in name and name.endswith(".json")]
        found = {match for name in models for match in _CLASS.findall(archive.read(name))}
    return {(module.decode(), name.decode()) for module, name in found}


@contextmanager
def _captured_logs() -> Iterator[list[str]]:
    """Keep torch's warnings about a file, tracebacks among them, off the screen; what they say is collected."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info is not None and record.exc_info[1] is not None:
            messages.append(first_line(record.exc_info[1]))
        return False

    loggers = [logging.getLogger(name) for name in _TORCH_LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeFilter(keep)

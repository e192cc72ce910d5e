"""The runner of passes: guard, run, check. What breaks the program is named with its pass and the space it ran for.

With ``SPINPASS_DUMP=DIR`` in the environment the program is written to DIR as text before and after every pass, and
each run of the pipeline gets a folder of its own.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TypeVar

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from spinpass.analysis import Space
from spinpass.errors import ConfigError, InvariantError, SpinpassError
from spinpass.graph import Changes, Invariants, ProgramEditor, listing
from spinpass.rotations import Rotation

from .functionalize import open_program
from .site_pass import SitePass
from .untie import still_tied, untie

DUMP = "SPINPASS_DUMP"
_WHOLE = "the whole program"
_Result = TypeVar("_Result")
_log = logging.getLogger("spinpass")


class PassRunner:
    """A runner of passes on a private copy of a program, ``editor``.

    Raises:
        InvariantError: a pass has broken the program, which is a bug in spinpass. The message names it and its space.
        ProgramError, QuantizedWeightError: as :func:`.functionalize.open_program`.
        ConfigError: SPINPASS_DUMP names a folder that cannot be written.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._dump = _Dump()
        self._dump.before(lambda: ProgramEditor(program), "Functionalize", _WHOLE)
        with _named("Functionalize", _WHOLE):
            self.editor = open_program(program)
            self._invariants = Invariants(self.editor)
            _check_signature(program, self.editor)
        self._dump.after(self.editor)

    def untie(self, constants: tuple[Node, ...]) -> None:
        """Give every use of the constants but one a copy, as :func:`.untie.untie` does.

        Raises:
            InvariantError: the program is broken by that.
        """
        self._run(
            "Untie",
            ", ".join(map(self.editor.fqn, constants)),
            lambda: untie(self.editor, constants),
            lambda changes: still_tied(self.editor, constants),
        )

    def run(self, site_pass: SitePass, space: Space, rotation: Rotation, name: str) -> Space:
        """Run one pass for the space of that name; return the space with what the pass has added to it.

        Raises:
            InvariantError: the pass has failed or broken the program.
        """
        if not site_pass.applies(space):
            return space
        return self._run(
            site_pass.name,
            name,
            lambda: site_pass.run(self.editor, space, rotation, name),
            lambda changes: site_pass.broken(self.editor, space, rotation, changes),
        )

    def _run(self, name: str, on: str, edit: Callable[[], _Result], broken: Callable[[Changes], str | None]) -> _Result:
        started = time.perf_counter()
        self._dump.before(lambda: self.editor, name, on)
        self.editor.under_way = f"{name} at {on}"
        with _named(name, on):
            result = edit()
            self._dump.after(self.editor)
            self._check(broken)
        self.editor.under_way = ""
        _log.debug("%-16s %-48s %7.1f ms", name, on, 1e3 * (time.perf_counter() - started))
        return result

    def _check(self, broken: Callable[[Changes], str | None]) -> None:
        why = broken(self._invariants.check())
        if why is not None:
            raise InvariantError(why)


def _check_signature(program: ExportedProgram, editor: ProgramEditor) -> None:
    """Raise InvariantError unless the copy takes and returns as many values as the program, inputs by their names."""
    signature = program.graph_signature
    named = [spec.arg.name for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    taken = [node.name for node in editor.user_inputs()]
    if named != taken:
        raise InvariantError(f"it takes {', '.join(taken)} in place of {', '.join(named)}")
    returned = sum(spec.kind == OutputKind.USER_OUTPUT for spec in editor.outputs)
    before = sum(spec.kind == OutputKind.USER_OUTPUT for spec in signature.output_specs)
    if returned != before or len(editor.outputs) < len(signature.output_specs):
        raise InvariantError(f"it returns {len(editor.outputs)} values in place of {len(signature.output_specs)}")


@contextmanager
def _named(name: str, on: str) -> Iterator[None]:
    """Say what goes wrong inside with the pass and the space; errors about the user's input stay what they are."""
    try:
        yield
    except InvariantError as error:
        raise InvariantError(f"{name} broke the program at {on}: {error}") from error
    except SpinpassError:
        raise
    except Exception as error:  # whatever a pass runs into is a bug in it
        raise InvariantError(f"{name} failed at {on}: {type(error).__name__}: {error}") from error


class _Dump:
    """Listings of the program around every pass, in a folder of this run; without a folder nothing is written."""

    def __init__(self) -> None:
        self._folder = _new_folder(wanted) if (wanted := os.environ.get(DUMP)) else None
        self._number = count(1)
        self._name = ""

    def before(self, editor: Callable[[], ProgramEditor], name: str, on: str) -> None:
        """Write the program as the pass finds it; ``editor`` is called only where something is written."""
        if self._folder is not None:
            where = re.sub(r"[^\w.#]+", "_", on)[:80]
            self._name = f"{next(self._number):04}-{where}-{name}"
            self._write(editor(), "before")

    def after(self, editor: ProgramEditor) -> None:
        """Write the program as the pass has left it."""
        if self._folder is not None:
            self._write(editor, "after")

    def _write(self, editor: ProgramEditor, when: str) -> None:
        assert self._folder is not None
        path = self._folder / f"{self._name}.{when}.txt"
        try:
            path.write_text(listing(editor), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}, which {DUMP} asks for, cannot be written: {error.strerror}") from error


def _new_folder(wanted: str) -> Path:
    """Make the first folder ``run-1``, ``run-2``, … in ``wanted`` that does not exist, and return it.

    Raises:
        ConfigError: the folder cannot be made.
    """
    for k in count(1):
        folder = Path(wanted, f"run-{k}").expanduser()
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if Path(wanted).expanduser().is_dir():
                continue  # of an earlier run
            raise ConfigError(f"{DUMP}={wanted}: a file of that name is in the way: name another folder") from None
        except OSError as error:
            raise ConfigError(f"{DUMP}={wanted} ({error.strerror}): name a folder that can be written") from error
    raise AssertionError("count() does not end")

"""What the command line shows: progress and messages on stderr, one table or one JSON document on stdout."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress as Display
from rich.text import Text

from spinpass.workers import Team

from .plain import PlainFormatter, plain, plain_json, plain_line
from .steps import EventSteps, ShownSteps, ToldSteps

_LOG = logging.getLogger("spinpass")
_PIPE_WIDTH = 140  # where there is no terminal to ask


class Screen:
    """Where one command writes. With ``as_json`` the result is JSON; with ``verbose`` passes are logged, and nothing is
    shortened. Strings are shown as they are: markup in them is text, and a control character is its number.
    """

    def __init__(
        self, *, as_json: bool = False, verbose: bool = False, streams: tuple[IO[str], IO[str]] | None = None
    ) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.out, self.err = (
            _PlainConsole(file=file, width=None if file.isatty() else _PIPE_WIDTH, markup=False, emoji=False)
            for file in streams or (sys.stdout, sys.stderr)
        )
        self._handler = RichHandler(console=self.err, show_path=False) if verbose else None
        if self._handler is not None:
            self._handler.setFormatter(PlainFormatter("%(message)s"))
            _LOG.addHandler(self._handler)
            _LOG.setLevel(logging.DEBUG)

    def close(self) -> None:
        """Stop logging."""
        if self._handler is not None:
            _LOG.removeHandler(self._handler)
            _LOG.setLevel(logging.NOTSET)

    @contextmanager
    def steps(self) -> Iterator[ToldSteps]:
        """Show the progress of a command's steps. The display is removed at the end; the times of the steps stay.

        With ``as_json`` each step and how far it is are events on stderr, one JSON object a line, see :mod:`.steps`.
        """
        if self.as_json:
            events = EventSteps(self.event)
            try:
                yield events
            finally:
                events.close()
            self.event({"event": "done", "seconds": events.seconds})
            return
        with Display(*ShownSteps.columns(), console=self.err, transient=True) as display:
            steps = ShownSteps(display)
            try:
                yield steps
            finally:
                steps.close()
        taken = {name: seconds for name, seconds in steps.seconds.items() if not name.endswith(":")}  # a heading
        self.note("  ".join(f"{name} {seconds:.1f} s" for name, seconds in taken.items()))

    def event(self, about: Mapping[str, Any]) -> None:
        """Write one JSON object as a line of stderr."""
        self.err.file.write(plain_line(about) + "\n")
        self.err.file.flush()

    def note(self, text: str) -> None:
        """Write one line to stderr, for people; in JSON mode an event."""
        if text and self.as_json:
            self.event({"event": "note", "text": plain(text)})
        elif text:
            self.err.print(text, style="dim", highlight=False)

    def error(self, text: str, kind: str) -> None:
        """Write one line to stderr; in JSON mode an event, and the document that says so."""
        if self.as_json:
            self.event({"event": "error", "error": kind, "message": plain(text)})
            self.document({"ok": False, "error": kind, "message": text})
            return
        self.err.print(f"spinpass: {text}", style="red", highlight=False, soft_wrap=True)

    def show(self, *renderables: object) -> None:
        """Write the result for people; in JSON mode nothing."""
        if not self.as_json:
            for renderable in renderables:
                self.out.print(renderable, highlight=False)

    def piece(self, text: str) -> None:
        """Write a part of a text that comes bit by bit; in JSON mode nothing."""
        if not self.as_json:
            self.out.file.write(plain(text))
            self.out.file.flush()

    def document(self, data: Any) -> None:
        """Write the result as one JSON document."""
        self.out.file.write(plain_json(data) + "\n")


class _PlainConsole(Console):
    """A console on which no string does more than to be seen. Its own styles are not in strings."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See :meth:`rich.console.Console.render_str`."""
        return super().render_str(plain(text), **options)


@dataclass
class CommandState:
    """What the handling of errors has to know about the command under way."""

    as_json: bool = False
    words: tuple[str, ...] = ()
    team: Team = field(default_factory=Team)
    streams: tuple[IO[str], IO[str]] = field(default_factory=lambda: (sys.stdout, sys.stderr))
    tracebacks: bool = False
    screen: Screen = field(init=False)

    def __post_init__(self) -> None:
        self.screen = Screen(as_json=self.as_json, streams=self.streams)


def screen_of(ctx: typer.Context, as_json: bool, verbose: int) -> Screen:
    """Where the command of this context writes, as its options ``--json`` and ``-v`` ask."""
    state: CommandState = ctx.obj
    state.screen = Screen(as_json=as_json, verbose=verbose > 0, streams=state.streams)
    state.tracebacks = verbose > 1
    return state.screen


def typed_command(ctx: typer.Context) -> str:
    """The command line of this context, as a shell takes it."""
    state: CommandState = ctx.obj
    return shlex.join(("spinpass", *state.words))


def team_of(ctx: typer.Context) -> Team:
    """The ranks that run the command of this context."""
    state: CommandState = ctx.obj
    return state.team

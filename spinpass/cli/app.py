"""The application: its commands, and what becomes of errors. Exit codes: 0 done, 2 what was asked for cannot be meant
(a wrong option, a combination, a file that is not there: :class:`~spinpass.errors.ConfigError`), 1 everything else that
ends a command: refused, not equivalent, a broken file, a missing package, a full disk.

A command prints a table, or with ``--json`` one JSON document, on stdout; progress and messages go to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from spinpass.errors import ConfigError, SpinpassError, did_you_mean
from spinpass.version import __version__
from spinpass.workers import joined_team, launched

from .chat import chat_command
from .demo import demo_command
from .evaluate import evaluate_command
from .export import export_command
from .generate import generate_command
from .inspect import inspect_command
from .learn import learn_command
from .plain import plain_streams
from .plan import plan_command
from .report import report_command
from .rotate import rotate_command
from .rotate_checkpoint import rotate_checkpoint_command
from .schemes import schemes_command
from .screen import CommandState, Screen
from .settings import SettledCommand
from .tune import tune_command
from .verify import verify_command

_OF_MANY = {"export"}  # the commands that a team can do


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spinpass {__version__}, torch {torch.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the versions of spinpass and torch, and exit."
    ),
]


class _Commands(TyperGroup):
    """The group of all commands, which turns errors into one line and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command, and say what is wrong with them as a command would."""
        given = tuple(args)  # of which reading takes away
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not given or not hasattr(error, "format_message"):  # without arguments help is printed, as an error
                raise
            _say(CommandState("--json" in given), _usage(error), "UsageError")
            raise typer.Exit(2) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say which name is near."""
        if args[0] not in self.commands and not ctx.resilient_parsing:
            ctx.fail(f"there is no command {args[0]}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        # what is wrong before the command begins is said in its way as well
        words = (*getattr(ctx, "_protected_args", ()), *ctx.args)
        stack = ExitStack()  # left last: a rank that has ended would let the launcher end the others
        try:
            if launched()[0]:
                stack.enter_context(_unheard())
            ctx.obj = state = CommandState("--json" in words, words)
            return self._invoked(ctx, state, words[0] if words else "", stack)
        finally:
            stack.close()

    def _invoked(self, ctx: Any, state: CommandState, command: str, stack: ExitStack) -> Any:
        try:
            state.team = stack.enter_context(joined_team())
            with plain_streams(), state.team.as_one():
                if state.team.size > 1 and command in self.commands and command not in _OF_MANY:
                    raise ConfigError(f"spinpass {command} is done by one process: start it without torchrun")
                try:
                    return super().invoke(ctx)
                except typer.Exit as way_out:  # of this rank alone
                    left = way_out
            raise left
        except BrokenPipeError as error:  # whoever read the output has left; nothing more can be said
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except Exception as error:  # the last place that can say it in one line
            if hasattr(error, "format_message"):  # an option that typer does not take
                _say(state, _usage(error), "UsageError")
                raise typer.Exit(2) from error
            if state.tracebacks or hasattr(error, "exit_code"):  # typer's own way out
                raise
            if not isinstance(error, SpinpassError):
                unexpected = f"unexpected {type(error).__name__}: {_one_line(error)}; -vv shows where"
                _say(state, unexpected, type(error).__name__)
                raise typer.Exit(1) from error
            _say(state, _one_line(error), type(error).__name__)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
        finally:
            state.screen.close()


def _usage(error: Any) -> str:
    """Return what is said of a wrong option or command: the name that is near, and where the right ones stand."""
    context = getattr(error, "ctx", None)
    command = context.command_path.split()[1:] if context is not None else []
    if hasattr(error, "possibilities"):
        said = f"there is no option {error.option_name}{did_you_mean(error.option_name, error.possibilities or ())}"
    else:
        said = _one_line(error.format_message()).rstrip(".").replace("Value error, ", "")  # the name of a class
    return f"{said}{'' if said.endswith('?') else ';'} see {' '.join(['spinpass', *command, '--help'])}"


@contextmanager
def _unheard() -> Iterator[None]:
    """Let nothing that is printed be seen: rank 0 says it."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _say(state: CommandState, text: str, kind: str) -> None:
    """Say why the command ends, once for all ranks."""
    if state.team.speaks and not state.team.leads:  # rank 0 was lost
        state.screen = Screen(
            as_json=state.as_json, streams=(sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr)
        )
    state.screen.error(text, kind)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rotate exported language models for low-bit quantization, and prove that they compute the same function.",
    epilog="Example: spinpass export ./model out",
)


@app.callback()
def _root(version: Version = False) -> None:
    """Take the options before the command."""


app.command("export", cls=SettledCommand)(export_command)
app.command("rotate")(rotate_command)
app.command("rotate-checkpoint")(rotate_checkpoint_command)
app.command("plan")(plan_command)
app.command("verify")(verify_command)
app.command("tune")(tune_command)
app.command("learn")(learn_command)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("report")(report_command)
app.command("schemes")(schemes_command)
app.command("inspect")(inspect_command)
app.command("demo")(demo_command)


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__

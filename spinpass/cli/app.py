"""The application: its commands, and what becomes of errors. Exit codes: 0 done, 1 refused or not equivalent, 2 bad
usage.

A command prints a table, or with ``--json`` one JSON document, on stdout; progress and messages go to stderr.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from spinpass.errors import ConfigError, ExportError, SpinpassError
from spinpass.folders import version_of

from .evaluate import evaluate_command
from .export import export_command
from .generate import generate_command
from .inspect import inspect_command
from .plain import plain_streams
from .plan import plan_command
from .report import report_command
from .rotate import rotate_command
from .screen import CommandState
from .tune import tune_command
from .verify import verify_command

_USAGE_ERRORS = (ConfigError, ExportError)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spinpass {version_of('spinpass')}, torch {torch.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the versions of spinpass and torch, and exit."
    ),
]


class _Commands(TyperGroup):
    """The group of all commands, which turns errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        ctx.obj = state = CommandState()
        try:
            with plain_streams():
                return super().invoke(ctx)
        except BrokenPipeError as error:  # whoever read the output has left; nothing more can be said
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except Exception as error:  # the last place that can say it in one line
            if state.tracebacks or hasattr(error, "exit_code"):  # typer's own way out
                raise
            if not isinstance(error, SpinpassError):
                unexpected = f"unexpected {type(error).__name__}: {_one_line(error)}; -vv shows where"
                state.screen.error(unexpected, type(error).__name__)
                raise typer.Exit(1) from error
            state.screen.error(_one_line(error), type(error).__name__)
            raise typer.Exit(2 if isinstance(error, _USAGE_ERRORS) else 1) from error
        finally:
            state.screen.close()


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rotate exported language models for low-bit quantization, and prove that they compute the same function.",
)


@app.callback()
def _root(version: Version = False) -> None:
    """Take the options before the command."""


app.command("export")(export_command)
app.command("rotate")(rotate_command)
app.command("plan")(plan_command)
app.command("verify")(verify_command)
app.command("tune")(tune_command)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("report")(report_command)
app.command("inspect")(inspect_command)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__

"""The entry of the command line, ``spinpass``; what it does is in :mod:`spinpass.cli.app`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .plain import print_traceback

if TYPE_CHECKING:
    from .definitions import CommandOption

__all__ = ["command_options", "main"]


def command_options(command: str) -> list[CommandOption]:
    """List the options of a command: see :func:`.definitions.options_of`, imported when it is asked for."""
    from .definitions import options_of

    return options_of(command)


def main(arguments: Sequence[str] | None = None, name: str = "spinpass") -> None:
    """Run the command line on ``arguments``, those of the process by default, and exit: 0 done, 1 refused, not
    equivalent or otherwise failed, 2 bad usage. ``name`` is what its help calls the program."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"spinpass: the command line needs {error.name}: pip install 'spinpass[cli]'", file=sys.stderr)
        sys.exit(1)
    try:
        app(arguments, prog_name=name)
    except Exception as error:  # with -vv, whatever it is
        print_traceback(error)
        sys.exit(1)


if __name__ == "__main__":
    main()

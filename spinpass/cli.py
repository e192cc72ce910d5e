"""The entry of the command line, ``spinpass``; what it does is in :mod:`spinpass.commands`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: 0 done, 1 refused or not equivalent, 2 bad usage."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"spinpass: the command line needs {error.name}: pip install 'spinpass[cli]'", file=sys.stderr)
        sys.exit(2)
    app(prog_name="spinpass")


if __name__ == "__main__":
    main()

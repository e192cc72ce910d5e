"""``python -m spinpass.hosts FILE`` writes the file in which Olive finds the pass."""

from __future__ import annotations

import sys

from spinpass.errors import SpinpassError


def write_for_olive(arguments: list[str]) -> int:
    """Write the file; return 0, 2 without a name for it, or 1 where it cannot be written."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m spinpass.hosts FILE", file=sys.stderr)
        return 2
    try:
        from .olive import write_package_config

        print(write_package_config(arguments[0]))
    except SpinpassError as error:
        print(f"spinpass: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(write_for_olive(sys.argv[1:]))

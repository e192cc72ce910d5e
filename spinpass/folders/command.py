"""An export as a command, for whoever wants the same folder again. It names no place of this machine."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from spinpass.evaluation import SELF, named_dataset


def command_of(settings: Mapping[str, Any], model: str) -> str:
    """Return the command that asks for what settings say, as :func:`.settings_of` makes them.

    Args:
        settings: options by name.
        model: its name on the hub; empty where it has none, and stands as MODEL. So does a text in a file, as TEXT.
    """
    words = ["spinpass", "export", model or "MODEL", "OUT"]
    for name, value in settings.items():
        words += _option(name, value)
    return " ".join(shlex.quote(word) for word in words)


def _option(name: str, value: Any) -> Iterator[str]:
    for each in value if isinstance(value, list) else [value]:
        yield f"--{name}"
        if name == "calibration" and each != SELF and not named_dataset(each):
            yield "TEXT"
        elif each is not True:
            yield str(each)
